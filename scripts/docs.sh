#!/usr/bin/env bash
# Serve the documentation on localhost and rebuild a page when its file changes.
#
#   scripts/docs.sh [--port N]          # 8000 without it
#   scripts/docs.sh build [--to DIR]    # write the pages to DIR (site) instead; a broken link fails
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare docs
export NO_MKDOCS_2_WARNING=1

if [[ "${1:-}" == build ]]; then
    shift
    [[ "${1:-}" != --to ]] || set -- --site-dir "${2:?which folder?}"
    exec .venv/bin/python -m mkdocs build --strict "$@"
fi
[[ "${1:-}" != --port ]] || set -- --dev-addr "127.0.0.1:${2:?which port?}"
exec .venv/bin/python -m mkdocs serve --strict "$@"
