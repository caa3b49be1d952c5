# Read by the other scripts: goes to the repository's root, and gives `prepare EXTRAS`, which makes .venv ready, and
# `accelerator_extra`.
# shellcheck shell=bash

CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.."

usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'

find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.14 python; do
        if command -v "$name" >/dev/null && "$name" -c "$usable" >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    echo "No Python 3.11 or newer with venv and pip was found (tried python3, python3.11 … python3.14)." >&2
    echo "Install one; on Debian and Ubuntu the packages are python3 and python3-venv. Then run this again." >&2
    return 1
}

# The extra for the accelerator of this machine, "" where there is none; says in one line why one stays unused.
# ACCELERATOR_ROOT: where /sys is looked for; else the root.
accelerator_extra() {
    local driver devices=${ACCELERATOR_ROOT:-}/sys/bus/pci/devices file id tpu="" gpu="" machine
    machine=$(uname -sm)
    if [[ "${JAX_PLATFORMS:-}" == cpu ]]; then return; fi
    for file in "$devices"/*/vendor; do
        [[ -r "$file" ]] || continue
        id=$(cat "$file" "${file%vendor}device" 2>/dev/null | tr '\n' ' ')
        case $id in
            "0x1ae0 0x0027 "* | "0x1ae0 0x005e "* | "0x1ae0 0x0062 "* | "0x1ae0 0x0063 "* | "0x1ae0 0x006f "* | "0x1ae0 0x0076 "*) tpu=yes ;;
            "0x10de "*) if [[ "$(cat "${file%vendor}class" 2>/dev/null)" == 0x03* ]]; then gpu=yes; fi ;;
        esac
    done
    if [[ -n "$tpu" ]]; then
        if [[ "$machine" == "Linux x86_64" ]]; then echo tpu; else echo "A TPU is here, and its software is for Linux x86_64, not $machine: on the CPU." >&2; fi
        return
    fi
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || driver=
    if [[ ! "$driver" =~ ^[0-9]+(\.[0-9]+)*$ ]]; then
        if [[ -n "$gpu" ]]; then echo "An NVIDIA GPU is here without a driver that works (nvidia-smi): on the CPU." >&2; fi
    elif [[ "$machine" != "Linux x86_64" ]]; then
        echo "An NVIDIA GPU is here, and constraints.txt has CUDA for Linux x86_64, not $machine: on the CPU." >&2
    elif ((${driver%%.*} < 580)); then
        echo "The NVIDIA driver is $driver, and CUDA 13 needs 580 or newer: on the CPU." >&2
    else
        echo cuda
    fi
}

# Install the package with the extras ("" for none, commas between them) in the versions of constraints.txt, unless that has been done.
# The folder belongs to the stamp: an environment that was moved is put right.
prepare() {
    local extra=$1 python=.venv/bin/python stamp wanted
    stamp=.venv/.installed-${extra:-base}
    if ! "$python" -c 'import pip' >/dev/null 2>&1; then
        local found
        found=$(find_python)
        echo "Making .venv with $("$found" --version) …"
        "$found" -m venv .venv
    elif ! "$python" -c "$usable" >/dev/null 2>&1; then
        echo ".venv has $("$python" --version), and 3.11 or newer is needed: move .venv away and run this again." >&2
        return 1
    fi
    wanted=$({ pwd && cat pyproject.toml constraints.txt; } | cksum)
    if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
        echo "Installing the package and what it needs into .venv (once, some minutes) …"
        "$python" -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}"
        echo "$wanted" >"$stamp"
        echo "$wanted" >.venv/.installed-base  # an extra comes with all that the package itself needs
    fi
}
