#!/usr/bin/env bash
# Runs a recipe on several nodes: sbatch --nodes 2 scripts/slurm.sh scripts/train_keep0.7.sh [flags]
# The output folder must be on a file system that all nodes share; VENV likewise. The recipe's last
# command must be `launch` (scripts/lib.sh), so that signals reach the run.
#
# Two minutes before the time limit (USR1) and on pre-emption (TERM) the run is told to stop: it
# finishes its update, writes a checkpoint and ends within 30 seconds. The job is then queued again,
# and the recipe's --resume auto goes on exactly there. A single process says by exit code 75 that
# it stopped for that reason; torchrun ends with 1, which counts if the signal came before. A job
# that was cancelled, or that failed by itself, is not queued again.
#SBATCH --job-name=bat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=80
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail
if (($# == 0)); then
    echo "usage: sbatch [--nodes N] scripts/slurm.sh RECIPE.sh [flags of main.py]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the root of the repository}"
export GPUS="${GPUS:-${SLURM_GPUS_ON_NODE:?ask for GPUS with --gpus-per-node}}"

# On several nodes the run is a job step, which torchrun is in; on one it is this shell's child.
stopped="" run=""
stop_run() {
    stopped=yes
    if ((${SLURM_NNODES:-1} > 1)); then
        scancel --signal=TERM "$SLURM_JOB_ID" || true # the steps, not this shell
    else
        [ -z "$run" ] || kill -TERM "$run" || true
    fi
}

trap stop_run USR1 TERM # first: a signal may come while the run is being started
bash "$@" &
run=$!
[ -z "$stopped" ] || stop_run
while true; do # a signal ends `wait` early
    code=0
    wait "$run" || code=$?
    kill -0 "$run" 2>/dev/null || break
done
if [ "$stopped" ]; then
    code=0
    wait "$run" || code=$? # once more: the last one may have given the signal's number
fi

if ((code == 75)) || { [ "$stopped" ] && ((code == 1 || code > 128)); }; then
    if [[ "$(scontrol show job "$SLURM_JOB_ID")" != *JobState=CANCELLED* ]]; then
        echo "stopped by a signal: job $SLURM_JOB_ID is queued again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
