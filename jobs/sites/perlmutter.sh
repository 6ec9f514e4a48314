# shellcheck shell=bash disable=SC2034,SC1091
# Perlmutter's GPU nodes (NERSC), after https://docs.nersc.gov/systems/perlmutter/running-jobs/ and
# https://docs.nersc.gov/jobs/affinity/ as they are remembered and quoted elsewhere: the pages could not be read when this
# was written. Not run there. Check: module names, the QOS, the constraint, and that accounts for GPUs end in _g.
# scheduler: slurm
# default: --ranks-per-node 4 --cpus-per-rank 32 --gpus-per-node 4
# directive: --constraint=gpu
# directive: --qos=regular
# directive: --gpus-per-node={gpus_per_node}

# 64 cores, two threads each: 32 are a quarter of a node. gpu-bind=none, or NCCL cannot see the other GPUs.
launch=(srun --ntasks="{ranks}" --nodes="{nodes}" --cpus-per-task="${SLURM_CPUS_PER_TASK:-32}" --cpu-bind=cores --gpu-bind=none
    --kill-on-bad-exit=1)

site_setup() {
    # The same as for HPC_KFAC_GPU=cuda HPC_KFAC_MPI=site MPICC="cc -shared" bash env/install.sh
    module load PrgEnv-gnu cudatoolkit craype-accel-nvidia80 python
    export MPICH_GPU_SUPPORT_ENABLED=1
    export MPICH_MAX_THREAD_SAFETY=multiple    # Horovod and the factor exchange call MPI from several threads
    export HDF5_USE_FILE_LOCKING=FALSE
    threads=$((${SLURM_CPUS_PER_TASK:-32} / 2))    # one for each core
    . env/.venv/bin/activate
}
