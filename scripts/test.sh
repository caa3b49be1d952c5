#!/usr/bin/env bash
# Lint, types and every test, on the CPU; stops at the first failure.
#
#   scripts/test.sh [arguments of pytest, for instance -k dpo, --golden DIR or --models DIR]
#   scripts/test.sh --fast       # without what is marked slow (layouts, whole runs, processes, browsers): 4 to 5 minutes on two cores, not 21
#
# Makes .venv and installs the package with its test extras if that has not been done.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

extra=$(accelerator_extra)  # what is installed fits the machine; the tests run on the CPU
prepare "dev${extra:+,$extra}"
export JAX_PLATFORMS=cpu

run() {
    echo "== $*"
    .venv/bin/python -m "$@"  # with -m the tests find each other from the root
}

run ruff check
run ruff format --check
run mypy
run pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"  # the tests of a file share what one worker has made and traced
echo "== all passed"
