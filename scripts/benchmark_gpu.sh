#!/usr/bin/env bash
# Makes the GPU tables of log/benchmark/ within LIMIT seconds (default 570): DeiT-S, bfloat16. What
# matters most comes first; a measurement that may not end in time is left out, and named.
# OUTPUT: where; BATCH: images at a time (256); METHODS: compiled last; DEVICE: cuda; VENV: see
# scripts/lib.sh.
source "$(dirname "$0")/lib.sh"
use_env
out="${OUTPUT:-log/benchmark/gpu}" device="${DEVICE:-cuda}" batch="${BATCH:-256}"
flags=("$@")
measure() { # seconds that it may take, folder, flags
    if ((SECONDS + $1 > ${LIMIT:-570})); then
        echo "$2: left out, $SECONDS s are spent"
        return
    fi
    echo "$2: after $SECONDS s"
    python -m tools.benchmark --device "$device" --dtype bf16 --keep-rate 0.7 0.5 0.3 0.2 \
        --latency-repetitions 0 --output-dir "$out/$2" --batch-size "$batch" "${@:3}" "${flags[@]}"
}
graphs=reduce-overhead
if [ "$device" = cpu ]; then graphs=default; fi # CUDA graphs need a GPU
others="evit tome dpcknn ppt evo random"
# The attention kernel that ran is among the operations.
measure 40 operation --what operation --keep-rate 0.7 --reduction bat topk
measure 60 eager --batch-size 1 "$batch" --reduction bat topk $others bat,proportional_attention=off
measure 150 compiled --reduction bat --compile
measure 120 graphs --batch-size 1 --reduction bat --compile "$graphs"
measure 30 stage --what stage --keep-rate 0.7 --reduction bat evit tome dpcknn
measure 30 train --what train --keep-rate 0.7 --reduction bat topk
measure 90 train_compiled --what train --keep-rate 0.7 --reduction bat --compile
measure 60 pixels384 --keep-rate 0.7 0.5 --batch-size $((batch / 4)) --input-size 384 --reduction bat
for method in ${METHODS:-topk $others}; do
    measure 150 "compiled_$method" --reduction "$method" --compile
done
