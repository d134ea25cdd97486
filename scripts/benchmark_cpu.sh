#!/usr/bin/env bash
# Makes the CPU tables of log/benchmark/: DeiT-S, float32, with THREADS threads (default 2), one and
# 16 images at a time. Run it while the cores are otherwise idle; it takes some 15 minutes.
# OUTPUT: where; DATA: an ImageFolder, for the input pipeline; VENV: see scripts/lib.sh.
source "$(dirname "$0")/lib.sh"
use_env
threads="${THREADS:-2}"
out="${OUTPUT:-log/benchmark/cpu_threads$threads}"
flags=("$@")
measure() { # folder, flags
    python -m tools.benchmark --device cpu --threads "$threads" --keep-rate 0.7 0.5 0.3 0.2 \
        --repetitions 16 --latency-repetitions 0 --output-dir "$out/$1" "${@:2}" "${flags[@]}"
}
measure eager --batch-size 1 16 --reduction bat topk bat,proportional_attention=off
measure compiled --batch-size 1 16 --reduction bat --compile
# Weights as constants let the compiler choose among kernels made for the number of tokens.
TORCHINDUCTOR_FREEZING=1 measure autotuned --batch-size 1 --reduction bat --compile max-autotune
measure operation --what operation --batch-size 1 --reduction bat
measure stage --what stage --batch-size 1 16 --reduction bat topk
measure train --what train --keep-rate 0.7 --batch-size 16 --reduction bat topk
measure pixels384 --keep-rate 0.7 0.5 --batch-size 4 --input-size 384 --reduction bat topk
measure memory --what stage --keep-rate 0.7 --batch-size 4 --input-size 224 384 512 \
    --reduction bat bat,cluster_ratio=0.4,match_ratio=0.1
if [ -n "${DATA:-}" ]; then
    OMP_NUM_THREADS=1 python -m tools.loading --data-path "$DATA" --num-workers 0 "$threads" \
        --device cpu --output-dir "$out/loading"
fi
