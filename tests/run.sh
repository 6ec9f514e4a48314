#!/usr/bin/env bash
# Builds the environment and runs every check: ruff, mypy, and all tests, serial and under mpirun, with coverage.
# Arguments go to pytest (a part of the tests then, and no coverage threshold): bash tests/run.sh tests/unit -k eigen
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash env/install.sh
bash tests/slurm/install.sh || true    # its tests then fail, and say so
export HPC_KFAC_REQUIRE_SLURM=1
. env/.venv/bin/activate

export OMP_NUM_THREADS=1
# Every Python process that is started from here on, ranks included, measures its coverage.
export COVERAGE_FILE=$PWD/.coverage COVERAGE_PROCESS_START=$PWD/setup.cfg

if [ $# -gt 0 ]; then
    exec pytest "$@"
fi
ruff check .
mypy
coverage erase
pytest
coverage combine --quiet
coverage report --fail-under=90
