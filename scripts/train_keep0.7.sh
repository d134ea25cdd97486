#!/usr/bin/env bash
# Trains BAT-DeiT-S from scratch at keep rate 0.7: 300 epochs of 625 updates of 2048 images.
# DATA: ImageNet's folder; GPUS, MAX_BATCH, AMP, OUTPUT, VENV: see scripts/lib.sh; flags are added.
source "$(dirname "$0")/lib.sh"
use_env
split_batch 2048
launch --model bat_deit_small_patch16_224 --keep-rate 0.7 $DESIGN --input-size 224 \
    --data-set IMNET --data-path "${DATA:-data/imagenet}" \
    --batch-size "$BATCH" --accum-steps "$ACCUM" --epochs 300 \
    --opt adamw --weight-decay 0.05 --sched cosine --lr 5e-4 --min-lr 1e-5 \
    --warmup-epochs 5 --warmup-lr 1e-6 --drop-path 0.1 \
    --aa rand-m9-mstd0.5-inc1 --color-jitter 0.3 --reprob 0.25 --smoothing 0.1 \
    --mixup 0.8 --cutmix 1.0 --repeated-aug --amp "${AMP:-fp16}" --resume auto \
    --output-dir "${OUTPUT:-output/bat_deit_small_keep0.7}" "$@"
