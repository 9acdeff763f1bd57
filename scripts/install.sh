#!/usr/bin/env bash
# Create the environment and install everything, at the versions of constraints.txt.
# Idempotent: a finished layer leaves a stamp named after what went into it; an interrupted one is done again.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.11}
VENV=${VENV:-.venv}

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
fail() {
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit 1
}

layer() { # layer NAME INPUT-FILES -- COMMAND: run COMMAND unless its stamp for these inputs exists
    local name=$1 inputs=()
    shift
    while [ "$1" != -- ]; do
        inputs+=("$1")
        shift
    done
    shift
    local stamp
    stamp="$VENV/.installed-$name-$(cat "${inputs[@]}" | sha256sum | cut -c1-16)"
    [ -e "$stamp" ] && return
    say "$name"
    "$@" || fail "installing '$name' failed" "see the lines above; run the same command again, finished parts are not repeated"
    rm -f "$VENV/.installed-$name-"*
    touch "$stamp"
}

command -v "$PYTHON" >/dev/null || PYTHON=python3
command -v "$PYTHON" >/dev/null || fail "no $PYTHON on the PATH" "install Python 3.11, or name one: make install PYTHON=/path/to/python3.11"
"$PYTHON" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info < (3, 14)))' ||
    fail "$("$PYTHON" --version) is not supported" "install Python 3.11, or name one: make install PYTHON=/path/to/python3.11"

free_gib=$(df -Pk . | awk 'NR==2 {print int($4 / 1048576)}')
[ -x "$VENV/bin/python" ] || [ "$free_gib" -ge 8 ] || fail "only $free_gib GiB free here" "the environment takes about 5 GiB with its downloads; free some space"

if ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
    say "environment $VENV"
    rm -rf "$VENV"
    "$PYTHON" -m venv "$VENV" || fail "cannot create $VENV" "Debian and Ubuntu: apt-get install python3.11-venv"
fi
. "$VENV/bin/activate"
pip() { command python -m pip --disable-pip-version-check -q "$@"; }

export DS_BUILD_OPS=0 # DeepSpeed compiles its kernels when they are first used, if ever
layer pip scripts/install.sh -- pip install -U "pip>=25"
# torch first: anything that depends on it would otherwise choose a build of its own.
layer torch constraints.txt -- pip install -c constraints.txt torch==2.13.0
layer atroposlib pyproject.toml constraints.txt -- \
    pip install -c constraints.txt -e ".[server,trainer,redis,export,environments,demo,dev]"
layer vllm scripts/install_vllm.sh constraints.txt -- scripts/install_vllm.sh
say "ready: . $VENV/bin/activate"
