#!/usr/bin/env bash
# Runs the tests on the oldest supported versions and on the newest that pip finds, each in an
# environment of its own, .venv-oldest and .venv-newest (6 GB each; delete one to renew it).
# VERSIONS: one of the two alone; flags are pytest's.
source "$(dirname "$0")/lib.sh"
declare -A requirements=([oldest]=requirements-oldest.txt [newest]=requirements-dev.txt)
for versions in ${VERSIONS:-oldest newest}; do
    (
        VENV=".venv-$versions"
        setup_env "${requirements[$versions]}"
        python -c 'import timm, torch; print(f"torch {torch.__version__}, timm {timm.__version__}")'
        python -m pytest -n 2 --dist loadfile "$@"
    )
done
