#!/usr/bin/env bash
# Builds the environment if need be and trains on this machine, with 2 ranks under mpirun.
#
#   bash jobs/local.sh [RUN.yaml] [--key value ...]     arguments go to the trainer
#   HPC_KFAC_RANKS=4 bash jobs/local.sh                 more ranks
#   FASHION_MNIST=/path bash jobs/local.sh              folder of Fashion-MNIST's four IDX .gz files
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ranks=${HPC_KFAC_RANKS:-2}
case $ranks in '' | 0 | *[!0-9]*)
    printf 'jobs/local.sh: HPC_KFAC_RANKS=%s is not a number of ranks. Mend: give 1 or more.\n' "$ranks" >&2
    exit 2
    ;;
esac

bash env/install.sh

images=${FASHION_MNIST:-/usr/share/datasets/fashion-mnist}
if [[ ${1:-} == *.yaml || ${1:-} == *.yml ]]; then
    run=$1
    [[ $run == /* ]] || [ -e "$run" ] || run=$here/$run
    shift
    printf 'Training %s on %s rank(s).\n' "$run" "$ranks"
elif [ -e "$images/train-images-idx3-ubyte.gz" ] || [ -e "$images/train-images-idx3-ubyte" ]; then
    run=jobs/runs/fashion_cnn.yaml
    [ -z "${FASHION_MNIST:-}" ] || set -- --task.path "$images" "$@"
    printf 'Training a convolutional net on Fashion-MNIST (found in %s) on %s rank(s).\n' "$images" "$ranks"
else
    run=jobs/runs/digits.yaml
    printf 'Training on scikit-learn'"'"'s digits on %s rank(s): Fashion-MNIST is not in %s\n' "$ranks" "$images"
    printf '(apt-get install dataset-fashion-mnist, or set FASHION_MNIST to its folder).\n'
fi

# The ranks share the cores.
cores=$(nproc)
threads=$((cores / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
HPC_KFAC_SCHEDULER=none HPC_KFAC_SITE=local HPC_KFAC_RANKS=$ranks exec bash jobs/launch.sh "$run" "$@"
