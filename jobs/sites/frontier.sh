# shellcheck shell=bash disable=SC2034,SC1091
# Frontier (OLCF), after https://docs.olcf.ornl.gov/systems/frontier_user_guide.html and
# https://docs.olcf.ornl.gov/software/analytics/pytorch_frontier.html (July 2026). Not run there. Check the versions of
# the modules; RCCL over libfabric needs the plugin (rccl-net-plugin).
# scheduler: slurm
# default: --ranks-per-node 8 --cpus-per-rank 7 --partition batch
# directive: --constraint=nvme

# Eight GPUs (GCDs) a node, 7 cores each, the eighth of each group being the system's. A rank sees its own GPU alone.
launch=(srun --ntasks="{ranks}" --nodes="{nodes}" --cpus-per-task="{threads}" --gpus-per-task=1 --gpu-bind=closest
    --kill-on-bad-exit=1)
stage=/mnt/bb/$USER

site_setup() {
    # The same as for HPC_KFAC_GPU=rocm HPC_KFAC_MPI=site MPICC="cc -shared" bash env/install.sh
    module load PrgEnv-gnu/8.7.0 cpe/26.03 rocm/7.1.1 craype-accel-amd-gfx90a rccl-net-plugin
    export LD_LIBRARY_PATH=$CRAY_LD_LIBRARY_PATH:$LD_LIBRARY_PATH    # as the cpe is not the default one
    export MPICH_GPU_SUPPORT_ENABLED=1
    export MPICH_MAX_THREAD_SAFETY=multiple
    export NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3    # hsn0 alone if it hangs
    export NCCL_CROSS_NIC=1 NCCL_NET_GDR_LEVEL=PHB
    export MIOPEN_USER_DB_PATH=/tmp/$USER-miopen MIOPEN_CUSTOM_CACHE_DIR=/tmp/$USER-miopen    # not in the home
    . env/.venv/bin/activate
}
