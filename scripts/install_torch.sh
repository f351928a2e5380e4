#!/usr/bin/env bash
# Install the tested torch into the environment of the given interpreter.
#
# On Linux, PyPI's torch brings gigabytes of CUDA libraries. Where there is no NVIDIA GPU this takes the CPU build instead:
# from the package index that pip is configured with if that has one, else from PyTorch's own index.
# Elsewhere (a GPU, macOS, Windows) the index's plain torch is the right one. CSKV_TORCH=cpu or =default overrides.
set -euo pipefail

python=${1:?usage: install_torch.sh PATH_TO_PYTHON}
version=$(sed -n 's/^torch==//p' "$(dirname "$0")/../constraints.txt")
build=${CSKV_TORCH:-}
if [ -z "$build" ]; then
  if [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then build=cpu; else build=default; fi
fi

if "$python" -c "import importlib.metadata as m; exit(m.version('torch').split('+')[0] != '$version')" 2>/dev/null; then
  echo "torch $version is installed already"
elif [ "$build" = default ]; then
  "$python" -m pip install --quiet "torch==$version"
elif ! "$python" -m pip install --quiet "torch==$version+cpu" 2>/dev/null; then
  "$python" -m pip install --quiet "torch==$version+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
fi
