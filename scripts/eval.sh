#!/usr/bin/env bash
# Evaluates a checkpoint: scripts/eval.sh CHECKPOINT [flags], e.g. --keep-rate 0.5.
# DATA: the data set's folder (val/ is enough); GPUS, VENV: see scripts/lib.sh.
source "$(dirname "$0")/lib.sh"
if (($# == 0)); then
    echo "usage: $0 CHECKPOINT [flags of main.py]" >&2
    exit 2
fi
checkpoint="$1"
shift
use_env
find_gpus
launch --eval --resume "$checkpoint" --data-path "${DATA:-data/imagenet}" \
    --batch-size "${MAX_BATCH:-256}" "$@"
