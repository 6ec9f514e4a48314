# shellcheck shell=bash disable=SC2034,SC1091
# Vista's Grace Hopper nodes (TACC), after https://docs.tacc.utexas.edu/hpc/vista/ (August 2026). Not run there. Check:
# module names, that --cpus-per-task is taken, and that ibrun passes USR2 on to the ranks; if it does not, the run is
# saved all the same before its limit, as the trainer knows that, and every checkpoint.minutes.
# scheduler: slurm
# default: --ranks-per-node 1 --cpus-per-rank 72 --partition gh

# One GPU and 72 cores a node. Slurm there refuses --gres and --gpus-per-task: never ask for --gpus-per-node.
if [ "${HPC_KFAC_LAUNCHER:-ibrun}" = mpirun ]; then
    launch=(mpirun -np "{ranks}" --map-by "ppr:{ranks_per_node}:node:PE={threads}")
else
    launch=(ibrun -n "{ranks}")
fi

# An image made by env/apptainer.def instead of env/.venv.
if [ -n "${HPC_KFAC_IMAGE:-}" ]; then
    container=(apptainer exec --nv "$HPC_KFAC_IMAGE") python=/opt/hpc_kfac/env/.venv/bin/python
fi

site_setup() {
    # The same as for HPC_KFAC_GPU=cuda HPC_KFAC_MPI=site bash env/install.sh
    module load gcc cuda openmpi python3
    [ "${#container[@]}" -eq 0 ] || module load tacc-apptainer
    [ "${#container[@]}" -gt 0 ] || . env/.venv/bin/activate
}
