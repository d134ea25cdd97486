# Functions shared by the scripts; sourced, not run. Every script starts in the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# BAT as the paper has it, as far as that is known: main.py's defaults are others, see the README.
DESIGN="--cluster-ratio 0.4 --match-ratio 0.1 --merge-weights importance --proportional-attention off"

# Makes the virtual environment once and puts it first on the PATH.
# VENV: its folder (default .venv); $1: the requirements file.
setup_env() {
    local venv="${VENV:-.venv}" requirements="$1"
    if [ ! -x "$venv/bin/python" ]; then
        echo "Making a virtual environment in $venv"
        python3 -m venv "$venv"
    fi
    PATH="$(cd "$venv" && pwd)/bin:$PATH"
    export PATH
    local stamp="$venv/.installed-$(basename "$requirements")"
    if [ ! -f "$stamp" ] || [ -n "$(find requirements*.txt -newer "$stamp")" ]; then
        echo "Installing $requirements into $venv (PyTorch is large: this takes minutes)"
        python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        touch "$stamp"
    fi
}

# Uses .venv (or VENV) when it is there, else the Python at hand.
use_env() {
    local venv="${VENV:-.venv}"
    if [ -x "$venv/bin/python" ]; then
        PATH="$(cd "$venv" && pwd)/bin:$PATH"
        export PATH
    fi
}

# Sets GPUS (per node, found out unless given) and NODES.
find_gpus() {
    NODES="${SLURM_NNODES:-1}"
    if [ -z "${GPUS:-}" ]; then
        GPUS="$(python -c 'import torch; print(torch.cuda.device_count())')"
    fi
    PROCESSES=$((NODES * (GPUS > 0 ? GPUS : 1)))
}

# Splits a recipe's total batch: sets BATCH (per process) and ACCUM so that
# BATCH x ACCUM x processes is $1 and BATCH is at most MAX_BATCH (default 256).
split_batch() {
    local total="$1" most="${MAX_BATCH:-256}"
    find_gpus
    if ((total % PROCESSES)); then
        echo "$0: a total batch of $total cannot be shared by $PROCESSES processes" >&2
        exit 2
    fi
    local share=$((total / PROCESSES))
    ACCUM=1
    while ((share % ACCUM || share / ACCUM > most)); do ACCUM=$((ACCUM + 1)); done
    BATCH=$((share / ACCUM))
    echo "total batch $total = $PROCESSES process(es) x $ACCUM accumulated x $BATCH images"
}

# Runs main.py with the given flags: alone, with torchrun, or with torchrun on every Slurm node.
launch() {
    # A store of its own for every restart: see https://github.com/pytorch/pytorch/issues/135712
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    if ((PROCESSES == 1)); then
        exec python main.py "$@"
    elif ((NODES == 1)); then
        exec torchrun --standalone --nproc-per-node "$GPUS" main.py "$@"
    fi
    local head
    read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # the first of many
    exec srun torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --rdzv-id "$SLURM_JOB_ID" \
        --rdzv-backend c10d --rdzv-endpoint "$head:${PORT:-29500}" main.py "$@"
}

# Fine-tunes DeiT-S at keep rate $1 with the released runs' schedule; more flags follow.
finetune_recipe() {
    local keep_rate="$1"
    shift
    use_env
    split_batch 1024
    launch --model bat_deit_small_patch16_224 --keep-rate "$keep_rate" $DESIGN --input-size 224 \
        --data-set IMNET --data-path "${DATA:-data/imagenet}" \
        --finetune "${DEIT:-https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth}" \
        --batch-size "$BATCH" --accum-steps "$ACCUM" --epochs 30 \
        --opt adamw --weight-decay 1e-6 --sched cosine --lr 2e-5 --min-lr 2e-6 --warmup-epochs 0 \
        --aa rand-m9-mstd0.5-inc1 --color-jitter 0.3 --reprob 0.25 --smoothing 0.1 \
        --mixup 0.8 --cutmix 1.0 --repeated-aug --amp "${AMP:-fp16}" --resume auto \
        --output-dir "${OUTPUT:-output/bat_deit_small_keep$keep_rate}" "$@"
}

# Runs main.py in the background, or goes on with an earlier run, once fewer than JOBS are under way;
# a finished one is left alone: NAME EPOCHS FLAGS..., below $runs. Needs `trap end_runs INT TERM`.
start_run() {
    local name="$1" epochs="$2" run="$runs/$1"
    shift 2 # done is what has a line an epoch, and a checkpoint after the last of them
    [[ "$run/checkpoint.pth" -nt "$run/log.txt" && $(wc -l <"$run/log.txt") = "$epochs" ]] && return
    while (($(jobs -rp | wc -l) >= JOBS)); do wait -n || echo "a run failed: see $runs/*.txt"; done
    echo "$(date +%T) $name"
    OMP_NUM_THREADS=$(($(nproc) > JOBS ? $(nproc) / JOBS : 1)) python main.py \
        --epochs "$epochs" --resume auto --output-dir "$run" "$@" >"$run.txt" 2>&1 &
}

# Ends the runs of `start_run`; each saves a checkpoint first.
end_runs() {
    kill $(jobs -p) 2>/dev/null || true
    wait
    exit 75
}
