#!/usr/bin/env bash
# Makes the GPU tables of log/benchmark/: DeiT-S, bfloat16, batch 256, compiled; 384 pixels too.
# OUTPUT: where; VENV: see scripts/lib.sh.
source "$(dirname "$0")/lib.sh"
use_env
out="${OUTPUT:-log/benchmark/gpu}"
measure() {
    local what="$1" folder="$2"
    shift 2
    python -m tools.benchmark --what "$what" --device cuda --dtype bf16 --compile \
        --reduction bat topk --output-dir "$out/$folder" "$@"
}
measure model model --keep-rate 0.7 0.5 0.3 0.2 --batch-size 256 "$@"
measure model model384 --keep-rate 0.7 0.5 --batch-size 64 --input-size 384 "$@"
measure stage stage --keep-rate 0.7 --batch-size 256 "$@"
measure train train --keep-rate 0.7 --batch-size 256 "$@"
