#!/usr/bin/env bash
# Builds the environment and runs the checks, all of them or the parts named:
#
#   bash tests/run.sh                          everything, and coverage of at least 90 %
#   bash tests/run.sh serial ranks             of the parts below these
#   bash tests/run.sh tests/unit -k eigen      pytest with these arguments
#
#   lint       ruff, mypy
#   serial     tests/unit on all cores; coverage is measured here and in the next
#   ranks      what needs ranks in tests/unit and tests/parallel: one mpirun a rank count
#   programs   tests of tests/unit that measure time, and tests/harness, tests/env, tests/faults: programs that are
#              started, killed, starved and stalled
#   slurm      tests/slurm, beside serial and ranks, since it waits most of the time
#   long       not of the default: runs that are killed dozens of times
#
# All parts run, whatever fails; at the end come the seconds of each.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PARTS=(lint serial ranks programs slurm)
MORE=(long)

lint() { ruff check . && mypy; }
serial() { measured pytest tests/unit -m "not ranks and not alone" -n "$(workers)" --dist worksteal; }
# Collecting the other files would take longer than some of the tests.
ranks() { measured pytest $(grep -rl --include="test_*.py" "pytest.mark.ranks" tests/unit tests/parallel) -m ranks; }
programs() {
    local status=0
    measured pytest tests/unit -m alone || status=1
    pytest tests/harness tests/env tests/faults -m "not long" || status=1
    return $status
}
slurm() {
    bash tests/slurm/install.sh || true    # its tests then fail, and say so
    HPC_KFAC_REQUIRE_SLURM=1 pytest tests/slurm
}

long() { pytest tests/faults -m long; }

# Every Python process that the command starts, ranks included, measures its coverage.
measured() { COVERAGE_FILE=$PWD/.coverage COVERAGE_PROCESS_START=$PWD/setup.cfg "$@"; }

# A worker takes about 1 GB.
# nproc would count the threads of OMP_NUM_THREADS.
workers() { local cores; cores=$(env -u OMP_NUM_THREADS nproc) && echo $((cores < 8 ? cores : 8)); }

is_part() { [[ " ${PARTS[*]} ${MORE[*]} " == *" $1 "* ]]; }

# Runs a part; notes its seconds and whether it failed.
part() {
    local start=$SECONDS status=passed
    printf '\n==== %s ====\n' "$1"
    "$1" || status=FAILED
    printf '%-10s %5d s  %s\n' "$1" $((SECONDS - start)) "$status" >>"$summary"
}

bash env/install.sh || exit 1
. env/.venv/bin/activate
export OMP_NUM_THREADS=1

if [ $# -gt 0 ] && ! is_part "$1"; then
    export HPC_KFAC_REQUIRE_SLURM=1
    bash tests/slurm/install.sh || true
    exec pytest "$@"
fi

wanted=" ${*:-${PARTS[*]}} "
for name in $wanted; do
    is_part "$name" || { printf 'tests/run.sh: no part %s; there are: %s\n' "$name" "${PARTS[*]} ${MORE[*]}" >&2 && exit 2; }
done
summary=$(mktemp)
export PYTEST_ADDOPTS="--durations=15 --durations-min=2 ${PYTEST_ADDOPTS:-}"
coverage erase
if [[ $wanted == *" slurm "* ]]; then
    set -m    # a group of its own, which ends with this script, also after Ctrl-C
    part slurm >"$summary.slurm" 2>&1 </dev/null &
    slurm_group=$!
    set +m
    trap 'kill -- -$slurm_group 2>/dev/null' EXIT
fi
for name in lint serial ranks; do
    [[ $wanted != *" $name "* ]] || part $name
done
wait
[ ! -f "$summary.slurm" ] || cat "$summary.slurm"
for name in programs long; do
    [[ $wanted != *" $name "* ]] || part $name
done
if [[ $wanted == *" serial "* && $wanted == *" ranks "* ]]; then
    covered() { coverage combine --quiet && coverage report --fail-under=90; }
    part covered
fi
printf '\n' && cat "$summary"
! grep -q FAILED "$summary"
status=$?
rm -f "$summary" "$summary.slurm"
exit $status
