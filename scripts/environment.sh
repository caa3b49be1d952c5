# Read by the other scripts: goes to the repository's root, and gives `prepare EXTRA`, which makes .venv ready.
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

# Install the package with the extra ("" for none) in the versions of constraints.txt, unless that has been done.
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
