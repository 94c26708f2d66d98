#!/bin/sh
# Runs every measurement of docs/dev/benchmarks.md with a given binary; writes one JSON file each into a folder.
# usage: tools/bench/all.sh BINARY FOLDER [further arguments of every command, for example --steps 20]
# RANKS=2 measures steps over so many GPUs instead.
# PRESETS=quickstart runs small stand-ins of every line, to try the script itself on a machine without a GPU.
set -eu

if [ $# -lt 2 ]; then
    sed -n '2,5s/^# //p' "$0" >&2
    exit 1
fi
binary=$1
folder=$2
shift 2
mkdir -p "$folder"
failed=0

# one NAME ARGUMENTS...: a measurement that fails does not stop the others.
one() {
    name=$1
    shift
    echo "== $name: specforge bench $*" >&2
    if "$binary" bench "$@" --json >"$folder/$name.json.tmp"; then
        mv "$folder/$name.json.tmp" "$folder/$name.json"
    else
        rm -f "$folder/$name.json.tmp"
        echo "failed: $name" >&2
        failed=1
    fi
}

if [ -n "${RANKS:-}" ]; then
    for zero in 0 1 2 3; do
        one "step-llama3-8b-2x2048-data$RANKS-zero$zero" step --preset llama3-8b --tokens 2x2048 --data "$RANKS" --zero "$zero" "$@"
    done
    one "step-llama3-8b-2x2048-tensor$RANKS" step --preset llama3-8b --tokens 2x2048 --tensor "$RANKS" "$@"
    for exchange in gather ring heads; do
        for tokens in 1x8192 1x32768; do
            one "step-llama3-8b-$tokens-sequence$RANKS-$exchange" \
                step --preset llama3-8b --tokens $tokens --sequence "$RANKS" --exchange $exchange "$@"
        done
    done
    exit $failed
fi

if [ "${PRESETS:-}" = quickstart ]; then
    one step-quickstart-2x64 step --preset quickstart --tokens 2x64 "$@"
    one step-quickstart-2x64-live0.5 step --preset quickstart --tokens 2x64 --live 0.5 "$@"
    one step-quickstart-2x64-online step --preset quickstart --tokens 2x64 --mode online "$@"
    one attention-128 attention --tokens 128 --heads 2 --kv-heads 1 --head-dim 64 --extras 2 "$@"
    one gemm-small gemm --m 64 --n 256 --k 128 "$@"
    one adamw-1e5 adamw --params 1e5 "$@"
    one loss-small loss --rows 448 --teacher-rows 64 --hidden 128 --vocab 1024 "$@"
    one experts-small experts --rows 64 --experts 8 --top-k 2 --hidden 64 --width 32 "$@"
    exit $failed
fi

one step-llama3-8b-1x2048 step --preset llama3-8b --tokens 1x2048 "$@"
one step-llama3-8b-2x2048 step --preset llama3-8b --tokens 2x2048 "$@"
one step-llama3-8b-2x2048-live0.5 step --preset llama3-8b --tokens 2x2048 --live 0.5 "$@"
one step-llama3-8b-2x2048-live0.25 step --preset llama3-8b --tokens 2x2048 --live 0.25 "$@"
one step-llama3-8b-1x8192 step --preset llama3-8b --tokens 1x8192 "$@"
one step-llama3-8b-1x32768 step --preset llama3-8b --tokens 1x32768 "$@"
one step-llama3-8b-2x2048-online step --preset llama3-8b --tokens 2x2048 --mode online "$@"
one step-llama3-8b-2x2048-online-fp8 step --preset llama3-8b --tokens 2x2048 --mode online --target-dtype fp8 "$@"
one step-qwen3-4b-1x2048 step --preset qwen3-4b --tokens 1x2048 "$@"
one step-qwen3-4b-2x2048 step --preset qwen3-4b --tokens 2x2048 "$@"
one step-qwen3-4b-2x2048-online step --preset qwen3-4b --tokens 2x2048 --mode online "$@"
one step-qwen3-8b-2x2048 step --preset qwen3-8b --tokens 2x2048 "$@"
one attention-8192 attention --tokens 8192 "$@"
one attention-8192-extras6 attention --tokens 8192 --extras 6 "$@"
one attention-8192-window1024 attention --tokens 8192 --window 1024 "$@"
one attention-2048-d64 attention --tokens 2048 --head-dim 64 "$@"
one gemm-gate-up gemm "$@"
one gemm-down gemm --n 4096 --k 14336 "$@"
one adamw-425e6 adamw --params 425e6 "$@"
one loss-14336 loss "$@"
one experts-4096 experts "$@"
one experts-4096-fp8 experts --dtype fp8 "$@"
exit $failed
