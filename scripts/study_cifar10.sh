#!/usr/bin/env bash
# The paper's main table and ablation in small, on CIFAR-10: see README, "Measured here".
# DATA: CIFAR-10 as an ImageFolder; OUTPUT: where everything goes; SIZE: cpu, gpu or smoke; JOBS:
# runs at a time; VENV: see scripts/lib.sh. Started again, it goes on.
source "$(dirname "$0")/lib.sh"
use_env
find_gpus
DATA="${DATA:-data/cifar10}" OUTPUT="${OUTPUT:-output/study_cifar10}"
SIZE="${SIZE:-$([ "$GPUS" -gt 0 ] && echo gpu || echo cpu)}"

# Sizes: the model, the images, and which runs there are.
WIDTH=64 HEADS=2 DEPTH=12 STAGES="3 6 9" BATCH=64 IMAGES=12800 # of an epoch
DENSE_EPOCHS=20 TUNE_EPOCHS=4 LR=1e-3 TUNE_LR=2e-4 TUNE_MIN_LR=2e-5
METHODS="topk evit tome dpcknn bat" RATES="0.7 0.5 0.3" SEEDS=1 # seeds: of 0.7, 0.5 and 0.3
SHELF_METHODS="random topk evit tome dpcknn bat" SHELF_RATES="1.0 0.7 0.6 0.5 0.4 0.3 0.2"
# Cluster and match ratios: off the shelf, and fine-tuned, both at 0.5.
RATIOS="$(echo {0,0.1,0.25,0.4,0.6,0.8},{0,0.05,0.1,0.2,0.3})" EXTREMES="0,0.3 0.8,0 0.8,0.3"
ON=(--device cpu --amp off) MIX=(--mixup 0 --cutmix 0 --drop-path 0)
case "$SIZE" in
cpu) ;; # some 100 minutes on two cores
gpu)
    WIDTH=192 HEADS=3 BATCH=512 IMAGES=50000 DENSE_EPOCHS=60 TUNE_EPOCHS=5 TUNE_LR=1e-4
    TUNE_MIN_LR=1e-5 METHODS=$SHELF_METHODS RATES="0.7 0.6 0.5 0.4 0.3 0.2" SEEDS=3
    ON=(--device cuda --amp bf16 --compile) MIX=(--mixup 0.8 --cutmix 1.0 --drop-path 0.1) ;;
smoke) # to see that everything runs; its figures mean nothing
    WIDTH=32 DEPTH=6 STAGES="1 3 4" BATCH=32 IMAGES=64 DENSE_EPOCHS=1 TUNE_EPOCHS=1
    METHODS="evit bat" RATES=0.5 SHELF_METHODS="evit bat" SHELF_RATES=0.5
    RATIOS=0.4,0.1 EXTREMES=0.8,0.3 ;;
*) echo "SIZE must be cpu, gpu or smoke, got $SIZE" >&2 && exit 2 ;;
esac
JOBS="${JOBS:-$([ "$SIZE" = gpu ] && echo 6 || nproc)}" # runs at a time
runs="$OUTPUT/runs" && mkdir -p "$runs"
trap end_runs INT TERM

train() { # NAME EPOCHS FLAGS...
    start_run "$1" "$2" --model bat_deit_tiny_patch16_224 --input-size 32 --reduction-loc $STAGES $DESIGN \
        --model-kwargs patch_size=4 embed_dim=$WIDTH depth=$DEPTH num_heads=$HEADS \
        --data-path "$DATA" --image-cache "$OUTPUT/images" --epoch-images $IMAGES --src \
        --batch-size $BATCH --eval-interval "$2" --unscale-lr \
        --aa none --color-jitter 0 --reprob 0 --no-repeated-aug --smoothing 0.1 --opt adamw \
        --sched cosine --no-model-ema --num-workers 0 "${ON[@]}" "${@:3}"
}
scratch() { # NAME FLAGS...
    train "$1" "$DENSE_EPOCHS" --lr "$LR" --min-lr 1e-5 --warmup-lr 1e-4 --weight-decay 0.05 \
        --warmup-epochs $((DENSE_EPOCHS > 1)) "${MIX[@]}" "${@:2}"
}
tune() { # NAME SEED FLAGS...; the schedule is that of scripts/finetune_*.sh
    train "$1_seed$2" "$TUNE_EPOCHS" --finetune "$runs/dense/checkpoint.pth" --seed "$2" \
        --lr "$TUNE_LR" --min-lr "$TUNE_MIN_LR" --warmup-epochs 0 --weight-decay 1e-6 --mixup 0 \
        --cutmix 0 "${@:3}"
}
measure() { # TOOL FLAGS...
    python -m "tools.$1" --checkpoint "$runs/dense/checkpoint.pth" --data-path "$DATA" \
        --device "${ON[1]}" --num-workers 0 "${@:2}"
}

# From scratch: what everything else starts from, and two methods at 0.7.
scratch dense --reduction none --keep-rate 1
for method in bat evit; do scratch "scratch_${method}_0.7" --reduction $method --keep-rate 0.7; done
wait

# Off the shelf: every method and keep rate, and bat's ratios at 0.5.
measure sweep "${ON[@]:2:2}" --reduction $SHELF_METHODS --keep-rate $SHELF_RATES \
    --output-dir "$OUTPUT/shelf"
for pair in $RATIOS; do
    measure sweep "${ON[@]:2:2}" --reduction bat --keep-rate 0.5 --cluster-ratio "${pair%,*}" \
        --match-ratio "${pair#*,}" --output-dir "$OUTPUT/ratios/$pair"
done
measure diversity --keep-rate 0.5 --output-dir "$OUTPUT/diversity"

# Fine-tuned: the dense model, methods and keep rates, the ablation, extremes of bat's ratios.
tune none_keep1 0 --reduction none --keep-rate 1
for ((seed = 0; seed < SEEDS; seed++)); do
    for rate in $RATES; do
        if ((seed)) && [[ "$rate" != 0.[753] ]]; then continue; fi
        for method in $METHODS; do
            tune "${method}_keep$rate" "$seed" --reduction "$method" --keep-rate "$rate"
        done
        if [[ "$rate" != 0.[53] ]]; then continue; fi
        ablate() { tune "ablation${rate}_$1" "$seed" --reduction bat --keep-rate "$rate" "${@:2}"; }
        ablate importance --cluster-ratio 0 --match-ratio 0
        ablate clusters --match-ratio 0
        ablate mean --merge-weights mean # with both and importance: bat_keep$rate
    done
done
for pair in $EXTREMES; do
    tune "ratios$pair" 0 --reduction bat --keep-rate 0.5 --cluster-ratio "${pair%,*}" \
        --match-ratio "${pair#*,}"
done
wait

# Tables, NAME BASELINE RUN...: all rates beside the dense model, each beside EViT, and the rest.
table() { python -m tools.table "${@:3}" --baseline "$runs/$2" --output-dir "$OUTPUT/tables/$1"; }
table all none_keep1_seed0 "$runs"/*_keep*_seed?
table scratch scratch_evit_0.7 "$runs"/{dense,scratch_*_0.7}
table ratios bat_keep0.5_seed0 "$runs"/{ablation0.5_importance,ratios*}_seed0
for rate in $RATES; do
    table "keep$rate" "evit_keep${rate}_seed0" "$runs"/*_keep"$rate"_seed?
    if [[ "$rate" != 0.[53] ]]; then continue; fi
    table "ablation$rate" "ablation${rate}_importance_seed0" \
        "$runs"/{bat_keep"$rate",ablation"$rate"_*}_seed?
done
