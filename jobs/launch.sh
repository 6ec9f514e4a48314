#!/usr/bin/env bash
# What every job does, whatever the scheduler. A template calls it as its last act, from the job's shell:
#
#   exec bash jobs/launch.sh RUN.yaml [--key value ...]
#
# It checks what it was given, prints what the job runs with, starts the ranks in the way of jobs/sites/$HPC_KFAC_SITE.sh,
# passes the scheduler's signals on to them, and in the end has the job queued again unless the run is complete.
#
#   HPC_KFAC_SITE       name of the site file (generic-cpu)
#   HPC_KFAC_NAME       name of the run (job name and number); that of an earlier run goes on with it
#   HPC_KFAC_DATA       file or folder of the data, and HPC_KFAC_STAGE: a folder on the nodes' own disks to copy it to
#   HPC_KFAC_SCHEDULER  none takes no notice of one; HPC_KFAC_RANKS then says how many ranks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

FRUITLESS=3    # starts in a row without a new checkpoint, after which the job is not queued again
FINAL=2        # exit status of a program that was refused: its settings, its data, or the way it was launched
AGAIN=75       # exit status of a program, and of a job, that wants to be started again

die() {
    printf 'jobs/launch.sh: %s\n  Mend: %s\n' "$1" "$2" >&2
    exit 2
}
say() { printf 'jobs/launch.sh: %s\n' "$1"; }

# Signals: USR2 has the ranks save and stop. The launcher itself must live on, or the ranks die with it.
pid='' warned='' signals=0
warn() {
    warned=$1 signals=$((signals + 1))
    [ -z "$pid" ] || kill -USR2 "$pid" 2>/dev/null || true
}
trap 'warn USR1' USR1
trap 'warn TERM' TERM

# Sets scheduler, job (its number), nodes, ranks and threads (of a rank).
find_allocation() {
    scheduler=none job='' nodes=1 ranks=${HPC_KFAC_RANKS:-2} threads=${OMP_NUM_THREADS:-1}
    if [ "${HPC_KFAC_SCHEDULER:-}" = none ]; then
        :
    elif [ -n "${SLURM_JOB_ID:-}" ]; then
        scheduler=slurm job=$SLURM_JOB_ID nodes=$SLURM_JOB_NUM_NODES
        ranks=${SLURM_NTASKS:-$((nodes * ${SLURM_NTASKS_PER_NODE:-1}))} threads=${SLURM_CPUS_PER_TASK:-1}
        [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    elif [ -n "${PBS_JOBID:-}" ]; then
        scheduler=pbs job=${PBS_JOBID%%.*}
        ranks=$(wc -l <"$PBS_NODEFILE") nodes=$(sort -u "$PBS_NODEFILE" | wc -l)
    elif [ -n "${LSB_JOBID:-}" ]; then
        scheduler=lsf job=$LSB_JOBID ranks=$LSB_DJOB_NUMPROC nodes=$(sort -u "$LSB_DJOB_HOSTFILE" | wc -l)
        [ "${LSB_JOBINDEX:-0}" = 0 ] || job=${job}_$LSB_JOBINDEX
    fi
    job=${job//[^A-Za-z0-9_.-]/_}
    case $ranks in '' | 0 | *[!0-9]*)
        die "$ranks is not a number of ranks" "ask the scheduler for tasks, or without one set HPC_KFAC_RANKS to 1 or more"
        ;;
    esac
}

# Reads the site file and sets command, the launcher with its options.
read_site() {
    local site=${HPC_KFAC_SITE:-generic-cpu} word
    [ -f "jobs/sites/$site.sh" ] || die "there is no site file jobs/sites/$site.sh" \
        "choose one of: $(cd jobs/sites && ls -- *.sh | sed 's/\.sh$//' | paste -sd' '); or write it (jobs/README.md)"
    python=$PWD/env/.venv/bin/python launch=() container=() stage=''
    site_setup() { :; }
    # shellcheck source=/dev/null
    . "jobs/sites/$site.sh"
    set +u    # modules and environments are careless
    site_setup
    set -u
    [ "${#container[@]}" -gt 0 ] || [ -f env/.venv/.finished ] || die "the environment env/.venv is missing" \
        "bash env/install.sh (on a login node, with the modules that jobs/sites/$site.sh loads)"
    command=()
    for word in "${launch[@]}"; do
        word=${word//\{ranks\}/$ranks} word=${word//\{nodes\}/$nodes} word=${word//\{threads\}/$threads}
        command+=("${word//\{ranks_per_node\}/$(((ranks + nodes - 1) / nodes))}")
    done
}

# Prints what the job runs with and sets run_dir. The program itself checks the settings.
report() {
    local scratch
    scratch=$(mktemp -d)
    say "$(date '+%F %T') ${scheduler/none/no scheduler}, job ${job:-none} on $nodes node(s): $ranks rank(s), $threads thread(s) each"
    say "launcher: ${command[*]}"
    if type module >/dev/null 2>&1; then module list 2>&1 || true; fi
    timeout 60 "${container[@]}" "$python" -m hpc_kfac info >"$scratch/info" 2>&1 &
    local info=$! status=0
    HPC_KFAC_RANKS='' "${container[@]}" "$python" -m hpc_kfac train "$@" --print_config >"$scratch/settings" || status=$?
    wait "$info" || true
    cat "$scratch/info"
    printf 'Settings:\n'
    sed 's/^/  /' "$scratch/settings"
    run_dir=$(sed -n 's/^run_dir: //p' "$scratch/settings")
    rm -r "$scratch"
    [ "$status" = 0 ] || { say "the settings cannot be used: not queued again"; exit 2; }
}

# Starts the ranks and waits for their end, which is in status.
run_ranks() {
    local settings=(HPC_KFAC_RANKS="$ranks" OMP_NUM_THREADS="$threads"
        HOROVOD_STALL_CHECK_TIME_SECONDS="${HOROVOD_STALL_CHECK_TIME_SECONDS:-60}"
        HOROVOD_STALL_SHUTDOWN_TIME_SECONDS="${HOROVOD_STALL_SHUTDOWN_TIME_SECONDS:-600}")
    # `env` behind the launcher, as launchers differ in which variables reach other nodes.
    command+=(env "${settings[@]}" "${staging[@]}" "${container[@]}" "$python" -m mpi4py -m hpc_kfac train "$@")
    "${command[@]}" &
    pid=$!
    local seen
    while :; do
        seen=$signals status=0
        wait "$pid" || status=$?
        # A signal ends the wait, too; waiting again gives the launcher's own status.
        [ "$signals" != "$seen" ] && [ "$status" -gt 128 ] || break
    done
    pid=''
}

# Every rank of a node waits until its first one has copied the data.
choose_staging() {
    staging=()
    stage=${HPC_KFAC_STAGE:-$stage}
    [ -z "${HPC_KFAC_STAGE:-}" ] || [ -n "${HPC_KFAC_DATA:-}" ] || die "HPC_KFAC_STAGE is set, but not what to copy there" \
        "set HPC_KFAC_DATA to the path of the data"
    [ -n "$stage" ] && [ -n "${HPC_KFAC_DATA:-}" ] || return 0
    staging=(bash "$PWD/jobs/stage.sh" "$HPC_KFAC_DATA" "$stage")
}

# The newest checkpoint's name.
newest() { (cd "$folder/checkpoints" 2>/dev/null && ls -d step-* 2>/dev/null) | grep -E '^step-[0-9]+$' | sort -V | tail -n 1 || true; }

# Counts the starts since the last new checkpoint, in a file that outlives this start; sets run_dir from it on a restart.
count_starts() {
    local last_job='' last='' count=0
    starts=logs/.$name.starts
    run_dir=''
    [ ! -f "$starts" ] || read -r last_job count last run_dir <"$starts" || true
    if { [ "$last_job" != "$job" ] && [ -z "${HPC_KFAC_RESUBMITTED:-}" ]; } ||
        { [ "$scheduler" = slurm ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; }; then
        count=0 run_dir=''    # somebody has submitted it anew
    fi
    [ -n "$run_dir" ] || report "$@"
    folder=$run_dir/$name
    present=$(newest)
    present=${present:-none}
    [ "$present" = "$last" ] || count=0
    tries=$((count + 1))
    printf '%s %s %s %s\n' "$job" "$tries" "$present" "$run_dir" >"$starts"
    [ "$tries" -le "$FRUITLESS" ] || give_up
}

give_up() {
    rm -f "$starts"
    say "no new checkpoint in $FRUITLESS starts (newest: $present): not queued again. The reason is above; when it is mended:"
    say "HPC_KFAC_NAME=$name and the same submission go on with this run"
    exit 1
}

# Ends the job: complete, given up, ended by the scheduler, or to be queued again.
conclude() {
    if [ -e "$folder/done.json" ]; then
        rm -f "$starts"
        say "$name is complete"
        exit 0
    fi
    local latest
    latest=$(newest)
    latest=${latest:-none}
    say "the launcher ended with status $status${warned:+ after $warned}; $name is not complete, its newest checkpoint: $latest"
    if [ "$latest" = "$present" ]; then
        if [ "$status" = "$FINAL" ]; then
            rm -f "$starts"
            say "the program was refused, and would be again: not queued again"
            exit 1
        fi
        [ "$tries" -lt "$FRUITLESS" ] || give_up
    fi
    "requeue_$scheduler"
}

# Slurm gives the job the same number again. A job that it is ending already (scancel, a dead node) is left to it.
requeue_slurm() {
    local state='' try
    for try in 1 2 3; do
        state=$(squeue -h -j "$SLURM_JOB_ID" -o %T 2>/dev/null) && break
        sleep "$try"
    done
    if [ -n "$state" ] && [ "$state" != RUNNING ]; then
        say "the job was cancelled, or is queued again by Slurm ($state)"
        exit 143
    fi
    say "queued again after ${SLURM_RESTART_COUNT:-0} restart(s)"
    scontrol requeue "$SLURM_JOB_ID" || {
        say "this Slurm does not let jobs be queued again; HPC_KFAC_NAME=$name and the same submission go on with this run"
        exit "$AGAIN"
    }
    exit "$AGAIN"
}

# Only an operator may qrerun, so the job submits its own script anew; the new job has another number and the same name.
requeue_pbs() {
    if [ "$warned" = TERM ]; then
        say "the job was ended by PBS: not queued again"
        exit 143
    fi
    export HPC_KFAC_RESUBMITTED=1 HPC_KFAC_NAME=$name
    local variables
    variables=$(compgen -A variable HPC_KFAC_ | grep -v HPC_KFAC_SCRIPT | paste -sd,)
    (cd "$PBS_O_WORKDIR" && qsub -N "$PBS_JOBNAME" -v "$variables" "$HPC_KFAC_SCRIPT") || {
        say "qsub failed; HPC_KFAC_NAME=$name and the same submission go on with this run"
        exit "$AGAIN"
    }
    say "submitted again"
    exit "$AGAIN"
}

# The template's `#BSUB -Q 75` has LSF queue it again.
requeue_lsf() {
    if [ "$warned" = TERM ]; then
        say "the job was ended by LSF: not queued again"
        exit 143
    fi
    say "LSF queues it again"
    exit "$AGAIN"
}

[ $# -gt 0 ] || die "no run file was given" "bash jobs/launch.sh RUN.yaml [--key value ...]"
[ -f "$1" ] || die "there is no run file $1 (looked from $PWD)" "give its path from there; examples are in jobs/runs"
find_allocation
read_site
choose_staging
if [ "$scheduler" = none ]; then
    run_ranks "$@"
    exit "$status"
fi
name=${HPC_KFAC_NAME:-${SLURM_JOB_NAME:-${PBS_JOBNAME:-${LSB_JOBNAME:-run}}}-$job}
name=${name//[^A-Za-z0-9_.-]/_}
count_starts "$@"
status=$AGAIN
[ -n "$warned" ] || run_ranks "$@" --name "$name" --resume auto
conclude
