#!/usr/bin/env bash
# Makes the CPU tables of log/benchmark/: DeiT-S, float32, with THREADS threads (default 2); 384
# pixels too. Run it while the cores are otherwise idle. OUTPUT: where; VENV: see scripts/lib.sh.
source "$(dirname "$0")/lib.sh"
use_env
threads="${THREADS:-2}"
out="${OUTPUT:-log/benchmark/cpu_threads$threads}"
measure() {
    local what="$1" folder="$2"
    shift 2
    python -m tools.benchmark --what "$what" --device cpu --threads "$threads" \
        --reduction bat topk --output-dir "$out/$folder" "$@"
}
measure model model --keep-rate 0.7 0.5 0.3 0.2 --batch-size 16 "$@"
measure stage stage --keep-rate 0.7 --batch-size 16 "$@"
measure train train --keep-rate 0.7 --batch-size 16 "$@"
measure model model384 --keep-rate 0.7 0.5 --batch-size 4 --input-size 384 \
    --latency-repetitions 0 "$@"
measure stage stage384 --keep-rate 0.7 --batch-size 4 --input-size 384 512 "$@"
