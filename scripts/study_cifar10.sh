#!/usr/bin/env bash
# The paper's main table and ablation in small, on CIFAR-10: see README, "Measured here".
# DATA: CIFAR-10 as an ImageFolder (default data/cifar10); OUTPUT: where everything goes (default
# output/study_cifar10); PRESET: cpu or gpu (default: gpu where there is one); flags are added, such
# as --budget-minutes 60 or --stop-after 9. Started again, it goes on with what is there.
source "$(dirname "$0")/lib.sh"
use_env
find_gpus
exec python study.py --preset "${PRESET:-$([ "$GPUS" -gt 0 ] && echo gpu || echo cpu)}" \
    --title "CIFAR-10: token reduction in small" --num-images 50000 10000 \
    --data-path "${DATA:-data/cifar10}" --output-dir "${OUTPUT:-output/study_cifar10}" "$@"
