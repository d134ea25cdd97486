#!/usr/bin/env bash
# Makes the GPU tables of log/benchmark/ within LIMIT seconds (default 570): DeiT-S, bfloat16. What
# matters most comes first; a measurement that may not end in time is left out or cut off, one that
# fails is passed over, and both are named. OUTPUT: where; BATCH: images at a time (256); METHODS:
# compiled last; DEVICE: cuda; VENV: see scripts/lib.sh.
source "$(dirname "$0")/lib.sh"
use_env
out="${OUTPUT:-log/benchmark/gpu}" device="${DEVICE:-cuda}" batch="${BATCH:-256}"
flags=("$@")
measure() { # seconds that it should take, folder, flags
    local left=$((${LIMIT:-570} - SECONDS))
    if ((left < $1)); then
        echo "$2: left out, $left s are left"
        return
    fi
    echo "$2: after $SECONDS s"
    timeout --kill-after 5 "$left" python -m tools.benchmark --device "$device" --dtype bf16 \
        --keep-rate 0.7 0.5 0.3 0.2 --latency-repetitions 0 --output-dir "$out/$2" \
        --batch-size "$batch" "${@:3}" "${flags[@]}" || echo "$2: ended with code $?"
}
graphs=reduce-overhead
if [ "$device" = cpu ]; then graphs=default; fi # CUDA graphs need a GPU
others="evit tome dpcknn ppt evo random"
# The attention kernel that ran is among the operations.
measure 30 operation --what operation --keep-rate 0.7 --reduction bat topk
measure 60 eager --batch-size 1 "$batch" --reduction bat topk $others bat,proportional_attention=off
for rates in "0.7 0.3" "0.5 0.2"; do # two, so that half a table is better than none
    measure 90 compiled --keep-rate $rates --reduction bat --compile
    measure 90 graphs --keep-rate $rates --batch-size 1 --reduction bat --compile "$graphs"
done
measure 30 stage --what stage --keep-rate 0.7 --reduction bat evit tome dpcknn
measure 30 train --what train --keep-rate 0.7 --reduction bat topk
measure 90 train_compiled --what train --keep-rate 0.7 --reduction bat --compile
# PyTorch takes cuDNN's attention first on newer GPUs; here it comes last.
TORCH_CUDNN_SDPA_DEPRIORITIZED=1 measure 30 eager_cudnn_last --batch-size 1 "$batch" --reduction bat
measure 60 pixels384 --keep-rate 0.7 0.5 --batch-size $((batch / 4)) --input-size 384 --reduction bat
for method in ${METHODS:-topk $others}; do
    measure 90 "compiled_$method" --reduction "$method" --compile
done
