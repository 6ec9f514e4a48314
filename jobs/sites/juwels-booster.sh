# shellcheck shell=bash disable=SC2034,SC1091
# JUWELS Booster (Juelich), after https://apps.fz-juelich.de/jsc/hps/juwels/batchsystem.html and
# https://apps.fz-juelich.de/jsc/hps/juwels/booster-overview.html, of which excerpts could be read. Not run there. Check:
# the stage and names of the modules, and that a job may be queued again; an account is needed (--account).
# scheduler: slurm
# default: --ranks-per-node 4 --cpus-per-rank 12 --gpus-per-node 4 --partition booster
# directive: --gres=gpu:{gpus_per_node}

# 48 cores a node. Slurm's extension there places each rank on the cores next to its GPU; no --cpu-bind=cores, which it
# refuses. Since Slurm 22.05 srun must be told the cores of a rank again.
launch=(srun --ntasks="{ranks}" --nodes="{nodes}" --cpus-per-task="{threads}" --threads-per-core=1
    --kill-on-bad-exit=1)

# An image made by env/apptainer.def instead of env/.venv, for members of the group "container".
if [ -n "${HPC_KFAC_IMAGE:-}" ]; then
    container=(apptainer exec --nv "$HPC_KFAC_IMAGE") python=/opt/hpc_kfac/env/.venv/bin/python
fi

site_setup() {
    # The same as for HPC_KFAC_GPU=cuda HPC_KFAC_MPI=site bash env/install.sh
    module load Stages/2025 GCC OpenMPI CUDA NCCL Python
    export NCCL_SOCKET_IFNAME=ib0
    if [ "${#container[@]}" -eq 0 ]; then
            . env/.venv/bin/activate
    fi
}
