#!/usr/bin/env bash
# Fine-tunes DeiT-S with BAT at keep rate 0.2: 30 epochs of 1251 updates of 1024 images.
# DATA: ImageNet's folder; DEIT: checkpoint to start from (default: downloaded);
# GPUS, MAX_BATCH, AMP, OUTPUT, VENV: see scripts/lib.sh; flags are added.
source "$(dirname "$0")/lib.sh"
finetune_recipe 0.2 "$@"
