#!/usr/bin/env bash
# BAT's settings off the shelf, one factor at a time from the best so far, and every baseline: a
# search on some of the validation images, a report on others.
# CHECKPOINT, DATA: a model with its head and the images of its classes; FLAGS: more flags of
# tools.sweep for them; SEARCH, REPORT: the parts of the images, K/N each (default 1/2 and 2/2);
# STEP: search, report or both; OUTPUT, VENV: see scripts/lib.sh. Started again, it goes on.
source "$(dirname "$0")/lib.sh"
use_env
OUTPUT="${OUTPUT:-output/study_settings}" STEP="${STEP:-both}"
: "${CHECKPOINT:?a checkpoint with a head}" "${DATA:?a folder with val/}"

sweep() { # FOLDER PART METHODS...
    python -m tools.sweep --checkpoint "$CHECKPOINT" --data-path "$DATA" --part "$2" \
        --keep-rate 0.7 0.5 0.3 --output-dir "$OUTPUT/$1" ${FLAGS:-} --reduction "${@:3}"
}
vary() { # SETTINGS NAME VALUES...: bat with these settings and each value of one more
    for value in "${@:3}"; do echo "bat,$1,$2=$value"; done
}
on=proportional_attention=on off=proportional_attention=off
base=$on,cluster_ratio=0.4,match_ratio=0.1 # what BAT was designed with, and proportional attention
many=$on,cluster_ratio=0.8,match_ratio=0.1 # clusters
few=$on,cluster_ratio=0                    # and none

if [ "$STEP" != report ]; then
    sweep search "${SEARCH:-1/2}" none random topk evit "evit,$on" tome "tome,$off" dpcknn \
        "dpcknn,$off" ppt \
        $(vary "$base" merge_weights importance mean size) \
        "bat,$off,cluster_ratio=0.4,match_ratio=0.1" \
        "bat,$off,cluster_ratio=0.4,match_ratio=0.1,merge_weights=mean" \
        $(vary "$on,match_ratio=0.1" cluster_ratio 0 0.1 0.25 0.6 0.8) \
        $(vary "$on,cluster_ratio=0.4" match_ratio 0 0.3 0.5 1) \
        $(vary "$base" features keys) $(vary "$base" density_neighbors 0) \
        $(vary "$on,match_ratio=0.5" cluster_ratio 0.25 0.6 0.8) \
        $(vary "$on,cluster_ratio=0.4,match_ratio=0.5" merge_weights mean size) \
        $(vary "$many" merge_weights mean size) $(vary "$many" features keys) \
        $(vary "$many" density_neighbors 0) $(vary "$on,cluster_ratio=0.8" match_ratio 0) \
        $(vary "$on,cluster_ratio=0.6,match_ratio=0.1" merge_weights mean) \
        "bat,$on,cluster_ratio=0.6,match_ratio=0.1,merge_weights=mean,features=keys" \
        "bat,$on,cluster_ratio=0.4,match_ratio=0.5,features=keys" \
        "bat,$on,cluster_ratio=0.25,match_ratio=0.3" "bat,$on,cluster_ratio=0.1,match_ratio=0.75" \
        $(vary "$few" match_ratio 0.3 0.5 0.6 0.67 0.75 1) \
        $(vary "$few,match_ratio=0.5" merge_weights mean size) \
        $(vary "$few,match_ratio=0.75" merge_weights mean) \
        $(vary "$few,match_ratio=0.5" features keys) "bat,$off,cluster_ratio=0,match_ratio=0.5"
fi
if [ "$STEP" != search ]; then # bat, tome and dpcknn alone: main.py's defaults
    sweep report "${REPORT:-2/2}" none topk evit dpcknn "dpcknn,$off" tome "tome,$off" tome,tome_r=13 \
        ppt ppt,tome_r=50 evo,keep_rate=0.5,reduction_loc=4+8 bat "bat,$base" \
        "bat,$off,cluster_ratio=0.4,match_ratio=0.1"
fi
