#!/usr/bin/env bash
# Train a language model from random weights to a reasoner on this machine, and write its story.
#
#   scripts/quickstart.sh [--tiny] [arguments of `lm run`, for instance --seed 1 --name seed1]
#
# Makes .venv and installs the package if that has not been done, with what an NVIDIA GPU or a TPU of this machine
# needs, then trains all stages of experiments/quickstart.py (--tiny: of the smaller experiments/tiny.py). Needs no data.
# Stop it when you like: the same command goes on where it was.
set -euo pipefail

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
fi

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

name=quickstart
arguments=()
for argument in "$@"; do
    if [[ "$argument" == --tiny ]]; then name=tiny; else arguments+=("$argument"); fi
done
experiment=experiments/$name.py

# Where the run will be: `lm run` takes the folder and the name from these two.
folder=
for ((i = 0; i < ${#arguments[@]}; i++)); do
    case ${arguments[i]} in
        --name) name=${arguments[i + 1]:-} ;;
        --name=*) name=${arguments[i]#*=} ;;
        --run-dir) folder=${arguments[i + 1]:-} ;;
        --run-dir=*) folder=${arguments[i]#*=} ;;
    esac
done
folder=${folder:-runs/$name}

prepare "$(accelerator_extra)"

code=0
.venv/bin/lm run "$experiment" ${arguments[@]+"${arguments[@]}"} || code=$?
if [[ $code == 130 ]]; then
    echo "Stopped. The same command goes on from here: scripts/quickstart.sh${*:+ $*}" >&2
elif [[ $code == 0 ]]; then
    [[ "$folder" == /* ]] || folder=$PWD/$folder
    echo
    echo "The story of this model, one page that opens offline: $folder/report.html"
    echo "Talk to it: $PWD/.venv/bin/lm chat $folder"
fi
exit "$code"
