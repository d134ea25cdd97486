#!/usr/bin/env bash
# Runs a recipe on several nodes: sbatch --nodes 2 scripts/slurm.sh scripts/train_keep0.7.sh [flags]
# The output folder must be on a file system that all nodes share; VENV likewise.
#SBATCH --job-name=bat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=80
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
set -euo pipefail
if (($# == 0)); then
    echo "usage: sbatch [--nodes N] scripts/slurm.sh RECIPE.sh [flags of main.py]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the root of the repository}"
export GPUS="${GPUS:-${SLURM_GPUS_ON_NODE:?ask for GPUS with --gpus-per-node}}"
bash "$@"
