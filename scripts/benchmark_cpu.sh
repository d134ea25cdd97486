#!/usr/bin/env bash
# Makes the CPU tables of log/benchmark/: DeiT-S, float32, with THREADS threads (default 2); 384
# pixels too. Run it while the cores are otherwise idle. DATA: a folder of photographs for the
# table of the input pipeline (none without it); OUTPUT; VENV: see scripts/lib.sh.
source "$(dirname "$0")/lib.sh"
use_env
threads="${THREADS:-2}"
out="${OUTPUT:-log/benchmark/cpu_threads$threads}"
common=(--device cpu --dtype float32 --threads "$threads" --reduction bat topk)
python benchmark.py --what model "${common[@]}" --keep-rate 0.7 0.5 0.3 0.2 --batch-size 16 \
    --output-dir "$out/model" "$@"
python benchmark.py --what stage "${common[@]}" --keep-rate 0.7 --batch-size 16 \
    --output-dir "$out/stage" "$@"
python benchmark.py --what train "${common[@]}" --keep-rate 0.7 --batch-size 16 \
    --output-dir "$out/train" "$@"
python benchmark.py --what model "${common[@]}" --keep-rate 0.7 0.5 --batch-size 4 \
    --input-size 384 --latency-repetitions 0 --output-dir "$out/model384" "$@"
python benchmark.py --what stage "${common[@]}" --keep-rate 0.7 --batch-size 4 \
    --input-size 384 512 --output-dir "$out/stage384" "$@"
if [ -n "${DATA:-}" ]; then
    python benchmark.py --what data --data-path "$DATA" --output-dir "$out/data" "$@"
fi
