#!/usr/bin/env bash
# Write constraints.txt anew: the newest versions that pyproject.toml allows, for the oldest Python that it does.
#
#   scripts/lock.sh PYTHON3.11
#
# All extras are resolved together, on Linux x86_64, so that every combination of them fits. Then run scripts/test.sh,
# and see that the same versions exist for newer Pythons:
#   python3.13 -m pip install --dry-run --ignore-installed -c constraints.txt '.[tpu,cuda,plan,docs,dev]'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${1:?which Python? the oldest that pyproject.toml allows, for instance python3.11}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --dry-run --report "$scratch/report.json" '.[tpu,cuda,plan,docs,dev]'
{
    sed -n '/^#/p' constraints.txt
    "$python" - "$scratch/report.json" <<'PYTHON'
import json
import re
import sys

found = [item["metadata"] for item in json.load(open(sys.argv[1]))["install"]]
pins = {re.sub(r"[-_.]+", "-", item["name"]).lower(): item["version"] for item in found}
print("\n".join(f"{name}=={version}" for name, version in sorted(pins.items()) if name != "lm"))
PYTHON
} >"$scratch/constraints.txt"
cp "$scratch/constraints.txt" constraints.txt
