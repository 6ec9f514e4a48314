#!/usr/bin/env bash
# Jobs one after another, each with the weights of the one before:  bash jobs/slurm/chain.sh FIRST.yaml SECOND.yaml ...
# A job begins when the one before is complete, however often that was queued again; if that has failed for good, the
# rest is dropped. SBATCH_... variables (SBATCH_ACCOUNT, SBATCH_PARTITION, ...) hold for all of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ $# -gt 1 ] || { echo "usage: bash jobs/slurm/chain.sh FIRST.yaml SECOND.yaml ..." >&2; exit 2; }

before='' weights=() run_dir=${HPC_KFAC_RUN_DIR:-logs}
for run in "$@"; do
    [ -f "$run" ] || { echo "chain.sh: there is no run file $run" >&2; exit 2; }
done
for run in "$@"; do
    name=$(basename "${run%.*}")-$(date +%Y%m%d-%H%M%S)-$$
    name=$name${before:+-after-$before}
    job=$(HPC_KFAC_NAME=$name sbatch --parsable --job-name="$(basename "${run%.*}")" \
        ${before:+--dependency=afterok:$before --kill-on-invalid-dep=yes} \
        jobs/slurm/train.sbatch "$run" --run_dir "$run_dir" "${weights[@]}")
    before=${job%%;*} weights=(--init_from "$run_dir/$name")
    echo "job $before: $run, run folder $run_dir/$name"
done
