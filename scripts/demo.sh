#!/usr/bin/env bash
# The whole main job in small: makes a labelled image set, trains a small BAT on it, evaluates it at
# four keep rates, and draws what it kept. Started again, it goes on with what is there.
# OUTPUT: where everything goes (default output/demo); VENV: see scripts/lib.sh.
source "$(dirname "$0")/lib.sh"
OUTPUT="${OUTPUT:-output/demo}"
setup_env requirements.txt

python main.py --data-set DEMO --data-path "$OUTPUT/data" --output-dir "$OUTPUT" --resume auto \
    --model bat_deit_tiny_patch16_224 --input-size 64 --keep-rate 0.7 $DESIGN \
    --model-kwargs patch_size=8 embed_dim=64 depth=8 num_heads=2 --reduction-loc 2 4 6 \
    --epochs 6 --batch-size 64 --lr 1e-3 --unscale-lr --warmup-epochs 0 --min-lr 1e-5 \
    --src --eval-crop-ratio 1.0 --aa none --color-jitter 0 --reprob 0 --mixup 0 --cutmix 0 \
    --smoothing 0 --drop-path 0 --no-repeated-aug --no-model-ema --num-workers 1

python -m tools.sweep --checkpoint "$OUTPUT/best.pth" --data-set DEMO --data-path "$OUTPUT/data" \
    --reduction bat --keep-rate 1.0 0.7 0.5 0.3 --num-workers 1 --output-dir "$OUTPUT/sweep"

python visualize_mask.py --checkpoint "$OUTPUT/best.pth" --data-set DEMO \
    --data-path "$OUTPUT/data" --shuffle --num-images 12 --output-dir "$OUTPUT/pictures"

echo
echo "Checkpoint:  $OUTPUT/best.pth"
echo "Log:         $OUTPUT/log.txt (one JSON object an epoch)"
echo "TensorBoard: tensorboard --logdir $OUTPUT/tensorboard"
echo "Pictures:    $OUTPUT/pictures/contact_sheet.png"
echo "Table, plot: $OUTPUT/sweep/"
