#!/usr/bin/env bash
# Installs what tests/slurm needs, as root on Debian or Ubuntu; elsewhere it says what is missing. It does nothing where
# all is there, and touches nothing in /etc but what the packages themselves bring.
set -euo pipefail

needed=(munged slurmctld slurmd sbatch)
missing=()
for program in "${needed[@]}"; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing+=("$program")
done
[ "${#missing[@]}" -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    printf 'tests/slurm/install.sh: missing: %s. Mend: as root, apt-get install slurm-wlm munge libpmix-dev\n' "${missing[*]}" >&2
    exit 1
fi
printf 'Installing Slurm for tests/slurm ...'
export DEBIAN_FRONTEND=noninteractive
# libpmix-dev brings the library that `srun --mpi=pmix` loads; slurm-wlm-torque a qsub that submits to Slurm.
{ timeout 120 apt-get update -qq && timeout 300 apt-get install -y --no-install-recommends \
    slurm-wlm munge libpmix-dev slurm-wlm-torque; } >/tmp/slurm-install.log 2>&1 || {
    printf ' failed:\n' && tail -n 5 /tmp/slurm-install.log >&2
    exit 1
}
printf ' done\n'
