"""Regenerate the tables: `python benchmarks/run.py [TABLE ...]`, all that this machine can make if none is named.

Each table is a module here with a function `tables()` that measures, keeps the numbers under benchmarks/results/ and
gives Markdown; each is a command of its own too, with options.
"""

from __future__ import annotations

import argparse
import importlib

MODULES = {
    "contests": ("against_peers", "CPU contests against other trainers and samplers"),
    "ahead_of_time": ("ahead_of_time", "what the TPU compiler says of pods"),
    "data": ("data", "making and reading the cache of tokens"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shown = ", ".join(f"{name} ({what})" for name, (_, what) in MODULES.items())
    parser.add_argument("tables", nargs="*", metavar="TABLE", choices=[[], *MODULES], help=shown)
    for name in parser.parse_args().tables or MODULES:
        print(f"## {name}\n\n{importlib.import_module(MODULES[name][0]).tables()}\n", flush=True)


if __name__ == "__main__":
    main()
