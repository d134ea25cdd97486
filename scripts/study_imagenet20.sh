#!/usr/bin/env bash
# The paper's main table and ablation in the regime of its users: DeiT-S, 196 tokens, photographs.
# DATA: an ImageFolder of photographs with train/ and val/; WEIGHTS: a checkpoint in DeiT-S's shapes,
# with or without a head; OUTPUT: where everything goes; SIZE: cpu, gpu or smoke; JOBS: runs at a
# time; VENV: see scripts/lib.sh. Started again, it goes on.
source "$(dirname "$0")/lib.sh"
use_env
find_gpus
DATA="${DATA:-data/imagenet20}" WEIGHTS="${WEIGHTS:-weights/deit_small.pth}"
OUTPUT="${OUTPUT:-output/study_imagenet20}"
SIZE="${SIZE:-$([ "$GPUS" -gt 0 ] && echo gpu || echo cpu)}"

# Sizes: the images and epochs of a run, and which runs there are.
METHODS="topk evit tome dpcknn bat" RATES="0.5 0.3" SEEDS=1
BATCH=32 IMAGES=4000 EPOCHS=1 LR=1e-5 ABLATE=0.5 # the rate of the ablation
SHELF=1/4 # of the validation images, off the shelf
ON=(--device cpu --amp bf16)
case "$SIZE" in
cpu) ;; # two cores
gpu)
    METHODS="random topk evit tome dpcknn ppt evo bat" RATES="0.7 0.5 0.3" SEEDS=3
    BATCH=128 IMAGES=6000 EPOCHS=5 LR=2e-5 SHELF=1/1
    ON=(--device cuda --amp bf16 --num-workers 5) ;; # compiling takes longer than such a run
smoke) # to see that everything runs; its figures mean nothing
    METHODS="topk evit bat" RATES=0.5 BATCH=16 IMAGES=32 SHELF=1/500 ;;
*) echo "SIZE must be cpu, gpu or smoke, got $SIZE" >&2 && exit 2 ;;
esac
JOBS="${JOBS:-$([ "$SIZE" = gpu ] && echo 3 || nproc)}" # runs at a time
runs="$OUTPUT/runs" && mkdir -p "$runs"
trap end_runs INT TERM
TITLE="SIZE=$SIZE: $EPOCHS epoch(s) of $IMAGES images, batch $BATCH, learning rate $LR, $SEEDS seed(s)"
echo "$TITLE"

# The fine-tuning recipe of scripts/finetune_*.sh, scaled to some thousand images: NAME START FLAGS...
tune() {
    start_run "$1" "$EPOCHS" --finetune "$2" --data-path "$DATA" --eval-crop-ratio 1.0 \
        --batch-size "$BATCH" --epoch-images "$IMAGES" --eval-interval "$EPOCHS" \
        --opt adamw --weight-decay 1e-6 --sched cosine --lr "$LR" --min-lr 1e-6 --unscale-lr \
        --warmup-epochs 0 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --smoothing 0.1 --mixup 0 \
        --cutmix 0 --no-repeated-aug --no-model-ema "${ON[@]}" "${@:3}"
}

# The dense model: a linear head where the weights have none, then all of it fine-tuned.
head="$OUTPUT/head.pth" dense="$runs/dense/checkpoint.pth"
if [ ! -e "$head" ]; then
    python -m tools.linear_head --checkpoint "$WEIGHTS" --data-path "$DATA" \
        --eval-crop-ratio 1.0 --output-dir "$OUTPUT"
fi
tune dense "$head" --reduction none --keep-rate 1
wait

# Fine-tuned from it: the same images in the same order for every method.
for ((seed = 0; seed < SEEDS; seed++)); do
    tune "none_keep1_seed$seed" "$dense" --seed "$seed" --reduction none --keep-rate 1
    for rate in $RATES; do
        for method in $METHODS; do
            tune "${method}_keep${rate}_seed$seed" "$dense" --seed "$seed" \
                --reduction "$method" --keep-rate "$rate"
        done
    done
    part() { # of BAT's parts: NAME FLAGS...
        tune "ablation_$1_seed$seed" "$dense" --seed "$seed" --reduction bat \
            --keep-rate "$ABLATE" $DESIGN "${@:2}"
    }
    part 1_clusters --match-ratio 0 # importance alone: topk_keep$ABLATE
    part 2_matching                 # the paper's design; main.py's default is bat_keep$ABLATE
    part 3_proportional --proportional-attention on
done
wait

# Off the shelf, on the dense weights: every method, BAT's parts, and the published settings.
design=bat,cluster_ratio=0.4,match_ratio=0.1
python -m tools.sweep --checkpoint "$dense" --data-path "$DATA" "${ON[@]:0:4}" \
    --reduction none random topk evit tome dpcknn ppt evo bat "$design,proportional_attention=on" \
    "$design,proportional_attention=off" tome,tome_r=13 ppt,tome_r=50 \
    evo,keep_rate=0.5,reduction_loc=4+8 --part "$SHELF" --keep-rate 0.7 0.5 0.3 \
    --output-dir "$OUTPUT/shelf"

# Tables, NAME BASELINE RUN...: all beside the dense model, each rate beside EViT, the ablation.
table() {
    python -m tools.table "${@:3}" --baseline "$runs/$2" --title "$TITLE" \
        --output-dir "$OUTPUT/tables/$1"
}
table all none_keep1_seed0 "$runs"/*_keep*_seed?
for rate in $RATES; do
    table "keep$rate" "evit_keep${rate}_seed0" "$runs"/*_keep"$rate"_seed?
done
table ablation "topk_keep${ABLATE}_seed0" "$runs"/{ablation_*,{topk,bat}_keep"$ABLATE"}_seed?
python -m tools.diversity --checkpoint "$dense" --data-path "$DATA" --reduction none evit bat \
    --keep-rate 0.5 --output-dir "$OUTPUT/diversity"
