# shellcheck shell=bash disable=SC2034,SC1091
# A GPU cluster with Slurm: one rank a GPU. Copy it for your site; the lines below that begin with a word and a colon are
# read by `hpc-kfac submit`: default (its own options) and directive (for the scheduler, replacing the template's).
# scheduler: slurm
# default: --ranks-per-node 4 --cpus-per-rank 8 --gpus-per-node 4
# directive: --gpus-per-node={gpus_per_node}

# Every rank sees all GPUs of its node and takes the one of its local rank: NCCL then finds the others by NVLink.
launch=(srun "--mpi=${HPC_KFAC_SRUN_MPI:-pmix}" --ntasks="{ranks}" --nodes="{nodes}" --cpus-per-task="{threads}"
    --gpu-bind=none --cpu-bind=cores --kill-on-bad-exit=1)

# An image made by env/apptainer.def instead of env/.venv (--rocm for AMD); the launcher stays outside.
if [ -n "${HPC_KFAC_IMAGE:-}" ]; then
    container=(apptainer exec --nv "$HPC_KFAC_IMAGE") python=/opt/hpc_kfac/env/.venv/bin/python
fi

site_setup() {
    # Load here what the environment was built with (HPC_KFAC_GPU=cuda HPC_KFAC_MPI=site bash env/install.sh):
    # module load cuda openmpi
    # The network that NCCL may use, where it guesses wrong (ip -br link):
    # export NCCL_SOCKET_IFNAME=ib0
    if [ "${#container[@]}" -eq 0 ]; then
            . env/.venv/bin/activate
    fi
}
