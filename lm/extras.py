"""Extras: the optional dependencies of the package, in `pyproject.toml`."""

import shlex
import sys


def install_command(extra: str) -> str:
    """The command that installs an extra beside the `lm` that runs; another Python's pip would find another package of this name."""
    return f"{shlex.quote(sys.executable)} -m pip install 'lm[{extra}]'"
