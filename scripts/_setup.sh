# shellcheck shell=bash
# Makes .venv and installs Evermini into it, editable. For the other scripts, from the repository's root:
#
#     . scripts/_setup.sh
#     setup [EXTRA ...]           e.g. `setup dev`
#
# Needs Python 3.11 or newer with the venv module, nothing else. PYTHON=/path/to/python chooses one; VENV=DIR puts the
# environment elsewhere. An environment that is up to date (same pyproject.toml, constraints and extras) is left alone.
set -euo pipefail

VENV="${VENV:-.venv}"

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.14; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer with the venv module is needed (Debian: apt install python3-venv)." >&2
    echo "If it is installed under another name, say PYTHON=/path/to/python $0" >&2
    return 1
}

install_torch() {
    # Linux wheels of torch on PyPI bring CUDA along (gigabytes). Without an NVIDIA GPU the CPU build is wanted; it is
    # on PyTorch's own index. Where that cannot be reached, PyPI's build does the same work.
    local cpu_index=https://download.pytorch.org/whl/cpu
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
        "$VENV/bin/pip" install --quiet --no-deps --retries 0 --timeout 10 --index-url "$cpu_index" \
            -c scripts/constraints.txt torch && return
        echo "PyTorch's CPU index cannot be reached; installing torch from PyPI instead." >&2
    fi
    "$VENV/bin/pip" install --quiet -c scripts/constraints.txt torch
}

# Is the environment what pyproject.toml and the constraints say, with at least the extras named?
is_current() {
    local extra
    [ -f "$VENV/.evermini-setup" ] && [ "$(sed -n 1p "$VENV/.evermini-setup")" = "$1" ] || return 1
    shift
    for extra in "$@"; do
        sed -n 2p "$VENV/.evermini-setup" | grep -qw "$extra" || return 1
    done
}

setup() {
    local version extras python
    version="$(cat pyproject.toml scripts/constraints.txt scripts/_setup.sh | cksum) $(pwd -P)"
    if is_current "$version" "$@"; then
        return
    fi
    if [ ! -x "$VENV/bin/python" ]; then
        python="$(find_python)"
        "$python" -m venv "$VENV"
    fi
    echo "Installing Evermini into $VENV (torch alone is some 200 MB: minutes on a slow line) ..." >&2
    extras="$(IFS=,; echo "$*")"
    install_torch
    "$VENV/bin/pip" install --quiet -c scripts/constraints.txt -e ".${extras:+[$extras]}"
    printf '%s\n%s\n' "$version" "$extras" >"$VENV/.evermini-setup"
}
