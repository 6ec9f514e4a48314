# shellcheck shell=bash disable=SC2034
# A CPU cluster with the environment that env/install.sh builds, its own Open MPI 5 included.
# scheduler: slurm
# HPC_KFAC_LAUNCHER=srun takes Slurm's own launcher, which needs Slurm built with PMIx (srun --mpi=list).

site_setup() {
    # With HPC_KFAC_MPI=site, load here the modules that the environment was built with.
    # shellcheck source=/dev/null
    . env/.venv/bin/activate
}

if [ "${HPC_KFAC_LAUNCHER:-mpirun}" = srun ]; then
    launch=(srun "--mpi=${HPC_KFAC_SRUN_MPI:-pmix}" --ntasks="{ranks}" --nodes="{nodes}" --cpus-per-task="{threads}")
else
    # Every rank gets cores of its own, as many as it has threads.
    launch=(mpirun -n "{ranks}" --map-by "slot:PE={threads}" --bind-to core)
    if [ -n "${HPC_KFAC_MPIRUN_OPTIONS:-}" ]; then
        read -ra options <<<"$HPC_KFAC_MPIRUN_OPTIONS"
        launch=(mpirun -n "{ranks}" "${options[@]}")
    fi
fi
