#!/usr/bin/env bash
# Copies the data to this node's own disk, once, checks the copy, and runs a program on it:
#
#   bash jobs/stage.sh DATA FOLDER program arguments ...
#
# Every rank calls it; the first one of a node copies, the others wait. The program gets --task.path COPY as its last
# arguments; if the copy fails, or differs from the data, the path of the data itself, and a warning.
set -euo pipefail
data=$1 folder=$2
shift 2

# Names, sizes and contents; or, quicker, names, sizes and times.
contents() { (cd "$1" && find . -type f -print0 | LC_ALL=C sort -z | xargs -0r sha256sum); }
listing() { (cd "$1" && find . -type f -printf '%p %s %T@\n' | LC_ALL=C sort); }

# A file is treated as a folder with nothing else in it.
if [ -f "$data" ]; then
    contents() { sha256sum <"$1"; }
    listing() { stat -L -c '%s %Y' "$1"; }
fi

copy=$folder/hpc_kfac-$(id -u)-$(printf %s "$data" | sha256sum | cut -c1-12)
target=$copy/$(basename "$data")

stage() {
    [ -e "$data" ] || { printf 'there is no %s\n' "$data" >&2; return 1; }
    mkdir -p "$copy" && exec 9>"$copy/lock" && flock 9 || return 1
    local source
    source=$(listing "$data") || return 1
    [ "$source" != "$(cat "$copy/staged" 2>/dev/null)" ] || return 0
    rm -rf "$target" "$copy/staged"
    cp -rL "$data" "$target" || return 1
    if [ "$(contents "$data")" != "$(contents "$target")" ]; then
        printf 'the copy in %s differs from %s\n' "$target" "$data" >&2
        return 1
    fi
    printf '%s\n' "$source" >"$copy/staged"
    printf '%s: copied %s to %s, checked\n' "$(hostname)" "$data" "$target"
}

if (stage); then    # the subshell's end gives the lock back
    exec "$@" --task.path "$target"
fi
printf '%s: WARNING: %s was not copied to %s (above); it is read where it is\n' "$(hostname)" "$data" "$folder" >&2
exec "$@" --task.path "$data"
