# shellcheck shell=bash disable=SC2034
# This machine, for jobs/local.sh: any MPI, more ranks than cores, root or not.
# scheduler: none

site_setup() {
    # shellcheck source=/dev/null
    . env/.venv/bin/activate
    set -a
    . env/launch.env
    set +a
}

launch=(mpirun -n "{ranks}")
