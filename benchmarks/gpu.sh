#!/usr/bin/env bash
# What a GPU has to show, in one call of six minutes, what matters most first:
#
#   benchmarks/gpu.sh OUT_DIR
#
#   tests       the kernels' tests, the first failure in full
#   attention   copy bandwidth, then one layer's step and its attention call, replayed, at 64K, 16K and 4K tokens
#   graph       decoding end to end by CUDA graphs, Llamas of 8B's and 1B's shape
#   paged       32 requests of mixed lengths, on latents in pages
#   ncu         the two slowest methods' kernels in Nsight Compute, where there is one
#   plans       other plans for the kernels than those that are made, and a profile
#
# Needs torch, triton and transformers, no network and no installation. Every result is written as it is had, a step that
# fails or runs out of time stops no other, and a summary comes last. STEPS="tests attention" runs some;
# LIMIT_tests=60 and so on are seconds; PYTHON=python3.12 picks the interpreter. REHEARSAL=1 runs all of it on a CPU, at
# tiny sizes, by Triton's interpreter.
set -uo pipefail

out=${1:?usage: benchmarks/gpu.sh OUT_DIR}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
steps=${STEPS:-tests attention graph paged ncu plans}
status=0
lines=()

if [ -n "${REHEARSAL:-}" ]; then
    export TRITON_INTERPRET=1
    on=(--device cpu --backend triton)
    tests=(-k "test_agrees_with_the_reference and one")
    attention=(--tiny --lengths 128 --batches 1 2 --budget 0.01 --methods "best uncompressed" joint "joint, int8 keys" "commuting, 4 bits")
    graph=(--quick --steps 1 --rounds 1 --warm 1 --lengths 48 --methods commuting)
    paged=(--quick)
    plans=(--quick --methods joint)
else
    on=(--device cuda)
    tests=(-m gpu)
    "$python" -c 'import xdist' 2>"/dev/null" && tests+=(-n 8)  # kernels are compiled side by side
    attention=(--lengths 65536 16384 4096 --batches 1 8 --budget 0.1)
    graph=(--steps 32 --rounds 3)
    paged=(--lengths 32768 8192 --batches 32)
    plans=()
fi

limit() {  # limit STEP SECONDS: those that it may take
    local name="LIMIT_$1"
    echo "${!name:-$2}"
}
step() {  # step NAME SECONDS COMMAND...: its output into OUT/NAME.txt, its end on the terminal
    local name=$1 seconds code=0 began=$SECONDS
    seconds=$(limit "$name" "$2")
    shift 2
    case " $steps " in *" $name "*) ;; *) return ;; esac
    timeout -k 5 "$seconds" "$@" >"$out/$name.txt" 2>&1 || code=$?
    case "$name $code" in *" 0" | "tests 5") ;; *) status=1 ;; esac  # pytest says 5 where no test ran
    [ $code = 124 ] && code="out of time"
    lines+=("$name: exit $code after $((SECONDS - began)) s of $seconds")
    echo "== ${lines[-1]}"
    tail -n "${TAIL:-40}" "$out/$name.txt"
}
speed() {  # speed STEP SECONDS BENCHMARK ARGUMENTS...: a benchmark, into OUT/BENCHMARK.json; no row is begun too late
    local name=$1 seconds=$2 benchmark=$3 most
    most=$(limit "$name" "$seconds")
    shift 3
    step "$name" "$seconds" "$python" -m benchmarks.speed "$benchmark" --keep-going --seconds $((most * 3 / 4)) \
        --out "$out/$benchmark.json" "${on[@]}" "$@"
}

{
    nvidia-smi
    "$python" -c 'import json; from cskv.evaluation.environment import environment; print(json.dumps(environment().to_dict(), indent=1))'
} >"$out/environment.txt" 2>&1
tail -n 12 "$out/environment.txt"

# Without the plugins and the strictness of pyproject.toml, which is for the tested versions.
TAIL=60 step tests 80 "$python" -m pytest -q --maxfail=1 "${tests[@]}" -p no:cacheprovider -o addopts= \
    -o filterwarnings=default --import-mode=importlib \
    tests/attention/triton tests/quantization/triton tests/attachment/test_decode_graph.py
TAIL=5 speed attention 100 decode "${attention[@]}"
TAIL=20 speed graph 90 graph "${graph[@]}"
TAIL=8 speed paged 30 paged "${paged[@]}"
TAIL=60 step ncu 30 "$python" -m benchmarks.speed.ncu "$out"
TAIL=20 speed plans 30 gpu "${plans[@]}"

echo "== summary"
printf '%s\n' "${lines[@]}"
"$python" -m benchmarks.speed.summary "$out" 2>&1 | tail -n 90
exit $status
