# shellcheck shell=bash disable=SC2034,SC1091
# Polaris (ALCF), after https://docs.alcf.anl.gov/polaris/running-jobs/ and
# https://docs.alcf.anl.gov/polaris/data-science/frameworks/pytorch/ (August 2026). Not run there. Check: the queue (prod
# wants 10 nodes or more), the file systems, and that mpiexec passes USR2 on to the ranks.
# scheduler: pbs
# default: --ranks-per-node 4 --cpus-per-rank 8 --partition prod
# directive: -l select={nodes}:system=polaris:mpiprocs={ranks_per_node}:ompthreads={cpus_per_rank}
# directive: -l place=scatter
# directive: -l filesystems=home:eagle

# GPU 0 is nearest to cores 24-31, GPU 3 to 0-7; a rank takes the GPU of its local rank.
launch=(mpiexec --np "{ranks}" --ppn "{ranks_per_node}" --cpu-bind list:24-31:16-23:8-15:0-7)

# An image made by env/apptainer.def instead of env/.venv; the MPI inside must be an MPICH for that (cray-mpich-abi).
if [ -n "${HPC_KFAC_IMAGE:-}" ]; then
    container=(apptainer exec --nv "$HPC_KFAC_IMAGE") python=/opt/hpc_kfac/env/.venv/bin/python
fi

site_setup() {
    module use /soft/modulefiles
    # Its Python, CUDA and NCCL, with NCCL's network settings; built on it: HPC_KFAC_GPU=cuda HPC_KFAC_MPI=site
    module load conda
    [ "${#container[@]}" -eq 0 ] || module load apptainer cray-mpich-abi
    export MPICH_GPU_SUPPORT_ENABLED=1 MPICH_MAX_THREAD_SAFETY=multiple
    export FI_CXI_DISABLE_HOST_REGISTER=1 FI_MR_CACHE_MONITOR=userfaultfd FI_CXI_DEFAULT_CQ_SIZE=131072
    [ "${#container[@]}" -gt 0 ] || . env/.venv/bin/activate
}
