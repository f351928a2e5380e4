#!/usr/bin/env bash
# Everything that a GPU has to show, in one call of under 10 minutes:
#
#   benchmarks/gpu.sh OUT_DIR
#
# Kernel tests, copy bandwidth and the goals' points with graph replays, outputs at odd lengths, plans of the kernels, a
# profile, the sweep, attention on pages, and generation end to end. Needs torch and transformers, no network and no
# installation. What a plain environment lacks is left out with a line. Rows are kept as soon as they are measured.
# PYTHON=python3.12 picks the interpreter; DECODE_ARGS, GPU_ARGS, PAGED_ARGS and GENERATION_ARGS are added to a step's.
set -uo pipefail

out=${1:?usage: benchmarks/gpu.sh OUT_DIR}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRITON_PRINT_AUTOTUNING=${TRITON_PRINT_AUTOTUNING:-1}
status=0

has() { "$python" -c "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(n) is None for n in sys.argv[1:]))" "$@"; }
step() {  # step NAME SECONDS COMMAND...: its output into OUT/NAME.txt, its tail on the terminal
    local name=$1 limit=$2 code=0
    shift 2
    timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1 || code=$?
    echo "== $name: exit $code"
    tail -n "${TAIL:-60}" "$out/$name.txt"
    case "$name $code" in *" 0" | "tests 5") ;; *) status=1 ;; esac  # pytest says 5 where no test ran
}

if ! has jaxtyping; then
    echo "jaxtyping is not installed: shape annotations mean nothing in this run"
    mkdir -p "$out/stand-ins"
    cat >"$out/stand-ins/jaxtyping.py" <<'PY'
class _Shape:
    def __class_getitem__(cls, _shape):
        return cls


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Shape
PY
    export PYTHONPATH="$PYTHONPATH:$out/stand-ins"
fi
for package in matplotlib rich typer hqq optimum; do
    has "$package" || echo "$package is not installed: what needs it is left out"
done

{
    nvidia-smi
    "$python" -c 'import json; from cskv.evaluation.environment import environment; print(json.dumps(environment().to_dict(), indent=1))'
    "$python" -c 'import triton; print("triton", triton.__version__)'
} >"$out/environment.txt" 2>&1
tail -n 16 "$out/environment.txt"

tests=()
for folder in tests/attention tests/quantization; do [ -d "$folder" ] && tests+=("$folder"); done
if has pytest hypothesis && [ ${#tests[@]} -gt 0 ]; then
    # Without the plugins and the strictness of pyproject.toml, which is for the tested versions.
    TAIL=15 step tests 110 "$python" -m pytest -q -m gpu -p no:cacheprovider -o addopts= -o filterwarnings=default \
        --import-mode=importlib "${tests[@]}"
else
    echo "pytest or hypothesis is missing: the outputs at odd lengths stand in for the tests"
fi
speed() {  # speed STEP SECONDS NAME FILE ARGUMENTS...: a benchmark, into OUT/FILE.json
    local name=$1 limit=$2 benchmark=$3 file=$4
    shift 4
    step "$name" "$limit" "$python" -m benchmarks.speed "$benchmark" --keep-going --out "$out/$file.json" "$@"
}
decode=(--device cuda --budget 0.2)
speed goals 75 decode decode "${decode[@]}" --lengths 65536 --batches 1 8 ${DECODE_ARGS:-}
for dtype in bfloat16 float16 float32; do
    speed "odd_$dtype" 30 decode "odd_$dtype" "${decode[@]}" --quick --dtype "$dtype" --lengths 64 1000 2049 --batches 1 3 ${DECODE_ARGS:-}
done
speed gpu 90 gpu gpu ${GPU_ARGS:-}
speed sweep 100 decode decode "${decode[@]}" --seconds "${SWEEP_SECONDS:-80}" ${DECODE_ARGS:-}
speed paged 65 paged paged ${PAGED_ARGS:-}
speed generation 70 generation generation --lengths 1024 16384 65536 ${GENERATION_ARGS:-}
exit $status
