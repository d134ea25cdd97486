#!/usr/bin/env bash
# Draws what each stage kept: scripts/visualize.sh CHECKPOINT IMAGES [flags of visualize_mask.py].
# IMAGES: a folder, a list of files, or one image; OUTPUT: where the pictures go.
source "$(dirname "$0")/lib.sh"
if (($# < 2)); then
    echo "usage: $0 CHECKPOINT IMAGES [flags of visualize_mask.py]" >&2
    exit 2
fi
checkpoint="$1" images="$2"
shift 2
use_env
exec python visualize_mask.py --checkpoint "$checkpoint" --data-path "$images" \
    --output-dir "${OUTPUT:-output/pictures}" "$@"
