#!/usr/bin/env bash
# Makes the GPU tables of log/benchmark/: DeiT-S, bfloat16, batch 256, compiled; 384 pixels too.
# VENV: see scripts/lib.sh.
source "$(dirname "$0")/lib.sh"
use_env
out="${OUTPUT:-log/benchmark/gpu}"
common=(--device cuda --dtype bf16 --compile --reduction bat topk)
python benchmark.py --what model "${common[@]}" --keep-rate 0.7 0.5 0.3 0.2 --batch-size 256 \
    --break-even --output-dir "$out/model" "$@"
python benchmark.py --what model "${common[@]}" --keep-rate 0.7 0.5 --batch-size 64 \
    --input-size 384 --output-dir "$out/model384" "$@"
python benchmark.py --what stage "${common[@]}" --keep-rate 0.7 --batch-size 256 \
    --output-dir "$out/stage" "$@"
python benchmark.py --what train "${common[@]}" --keep-rate 0.7 --batch-size 256 \
    --output-dir "$out/train" "$@"
