#!/usr/bin/env bash
# Sets up a virtual environment and runs the tests in two processes; flags are pytest's.
# VENV: see scripts/lib.sh.
source "$(dirname "$0")/lib.sh"
setup_env requirements-dev.txt
exec python -m pytest -n 2 --dist loadfile "$@"
