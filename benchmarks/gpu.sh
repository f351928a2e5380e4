#!/usr/bin/env bash
# What a GPU has to show, in one call of six minutes, what matters most first:
#
#   benchmarks/gpu.sh OUT_DIR
#
#   tests       the kernels' tests, the first failure in full
#   attention   copy bandwidth, then one layer's step and its attention call, replayed, at 64K, 16K and 4K tokens
#   graph       decoding end to end, Llamas of 8B's and 1B's shape, by CUDA graphs and by forwards
#   paged       32 requests of mixed lengths, on latents in pages
#   ncu         the two slowest methods' kernels in Nsight Compute, where there is one
#   plans       a profile of the attention calls, and other plans for the kernels than those that are made
#
# Needs torch, triton and transformers, no network and no installation. Every result is written as it is had, a step that
# fails or runs out of time stops no other, one that loses the GPU goes on in a new process without what lost it, and a
# summary comes last. STEPS="tests attention" runs some; LIMIT_tests=60 and so on are seconds; ARGS_attention="--batches
# 1" and so on are added to a step's arguments; PYTHON=python3.12 picks the interpreter. REHEARSAL=1 runs all of it on a
# CPU, at tiny sizes, by Triton's interpreter.
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
    attention=(--tiny --lengths 128 --batches 1 2 --methods "best uncompressed" joint "joint, int8 keys" "commuting, 4 bits")
    graph=(--quick --steps 1 --rounds 1 --warm 1 --lengths 48 --methods commuting)
    paged=(--quick)
    plans=(--quick --repeats 1 --methods joint)
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
    local name=$1 seconds code began=$SECONDS left more="ARGS_$1" attempt
    seconds=$(limit "$name" "$2")
    shift 2
    case " $steps " in *" $name "*) ;; *) return ;; esac
    : >"$out/$name.txt"
    for attempt in 1 2 3 4; do
        left=$((seconds - SECONDS + began)) code=0
        # shellcheck disable=SC2086  # words
        timeout -k 5 "$((left > 1 ? left : 1))" "$@" ${!more:-} >>"$out/$name.txt" 2>&1 || code=$?
        [ "$name $code" != tests\ 4 ] && [ $code = 4 ] || break  # the benchmarks' code for a GPU that is lost
    done
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
TAIL=20 step tests 65 "$python" -m pytest -q --maxfail=20 "${tests[@]}" -p no:cacheprovider -o addopts= \
    -o filterwarnings=default --import-mode=importlib \
    tests/attention/triton tests/quantization/triton tests/attachment/test_decode_graph.py
case " $steps " in
*" tests "*)  # the first failure in full
    awk '/^=+ (FAILURES|ERRORS) =+$/ { on = 1; next }
        on && /^_+ .* _+$/ && ++n > 1 { exit }
        on' "$out/tests.txt" | head -n 70
    ;;
esac
TAIL=5 speed attention 85 decode "${attention[@]}"
TAIL=5 speed graph 75 graph "${graph[@]}"
TAIL=5 speed paged 20 paged "${paged[@]}"
TAIL=5 step ncu 40 "$python" -m benchmarks.speed.ncu "$out"
TAIL=5 speed plans 35 gpu "${plans[@]}"

echo "== summary"
grep -hE "^(FAILED|ERROR) " "$out/tests.txt" 2>/dev/null | cut -c 1-150 | head -n 5
"$python" -m benchmarks.speed.summary "$out" 2>&1
printf '%s\n' "${lines[@]}"
exit $status
