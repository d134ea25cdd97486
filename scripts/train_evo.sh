#!/usr/bin/env bash
# Trains Evo-ViT-S as published: 300 epochs of 1024 images, the first 200 with a layer-wise warm-up;
# half of the patches active from blocks 4 and 8 (0-based) on; the mean patch and the class token
# are both trained.
# DATA: ImageNet's folder; GPUS, MAX_BATCH, AMP, OUTPUT, VENV: see scripts/lib.sh; flags are added.
source "$(dirname "$0")/lib.sh"
use_env
split_batch 1024
launch --model bat_deit_small_patch16_224 --input-size 224 \
    --reduction evo --keep-rate 0.5 --reduction-loc 4 8 --evo-readout mean \
    --evo-layerwise-epochs 200 --data-set IMNET --data-path "${DATA:-data/imagenet}" \
    --batch-size "$BATCH" --accum-steps "$ACCUM" --epochs 300 \
    --opt adamw --weight-decay 0.05 --sched cosine --lr 5e-4 --min-lr 1e-5 \
    --warmup-epochs 5 --warmup-lr 1e-6 --drop-path 0.1 \
    --aa rand-m9-mstd0.5-inc1 --color-jitter 0.4 --reprob 0.25 --smoothing 0.1 \
    --mixup 0.8 --cutmix 1.0 --repeated-aug --amp "${AMP:-fp16}" --resume auto \
    --output-dir "${OUTPUT:-output/evo_deit_small}" "$@"
