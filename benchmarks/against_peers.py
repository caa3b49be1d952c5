"""The CPU contests against other trainers and samplers, interleaved: runs the peers' kit with `lm` in its table.

    python benchmarks/against_peers.py --kit FOLDER [--rounds 3] [--contests A B] [--cores 1] [--quick]
    python benchmarks/against_peers.py --kit FOLDER --lora [--rounds 3]     # contest A with an adapter, against TRL + PEFT

FOLDER has the kit's run.py and the peers; $PEER_KIT if not given. Each peer needs an interpreter of its own, named by an
environment variable (see contestants.json: TORCH_PY, TUNIX_PY, MKL_SHIM); one whose variables are not set is left out.
Prints the tables and keeps the rows in benchmarks/results/contests.json (contests_lora.json), which is started anew by every run.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KEPT = (
    "contestant", "contest", "dtype", "round", "tokens_per_s", "tokens_per_cpu_s", "step_ms", "compile_s",
    "peak_rss_mb", "others", "cores", "quick", "rollout_ms", "update_ms",
)  # fmt: skip
UNITS = {"A": "tokens/s", "B": "new tokens/s", "C": "pairs/s", "D": "steps/s"}
NAMES = {"A": "pretraining step", "B": "sampling", "C": "DPO step", "D": "GRPO step"}

Row = dict[str, Any]


def tables(
    kit: str | None = None,
    rounds: int = 1,
    contests: Sequence[str] = tuple(UNITS),
    cores: int = 0,
    quick: bool = False,
    only: str = "",
    lora: bool = False,
) -> str:
    """Run the contests, keep the rows, and give them as Markdown.

    Args:
        cores: pin every contestant to this many and rank by CPU time, for a machine that others use; 0: all, by time.
        quick: a quarter of the work.
        only: a regular expression on "contestant dtype".
        lora: contest A with an adapter of rank 16 on all linear layers.
    """
    folder = kit or os.environ.get("PEER_KIT")
    if not folder or not (Path(folder) / "run.py").is_file():
        return f"skipped: no run.py in {folder!r}; name the kit's folder by --kit or PEER_KIT"
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "rows.jsonl")
        command = [sys.executable, "run.py", "--list", str(HERE / _file("contestants", lora)), "--out", str(out)]
        command += ["--rounds", str(rounds), "--cores", str(cores), "--only", only]
        command += ["--contests", *(["A"] if lora else contests)]
        environment = os.environ | {"LM_PY": sys.executable, "LM_ROOT": str(HERE.parent.resolve())}
        subprocess.run(
            [*command, *(["--quick"] if quick else [])], cwd=folder, env=environment, stdout=sys.stderr, check=True
        )
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    failed = [row for row in rows if "error" in row]
    kept = [{name: row[name] for name in KEPT if name in row} for row in rows if "error" not in row]
    results = HERE / "results" / _file("contests", lora)
    results.parent.mkdir(exist_ok=True)
    results.write_text("[\n" + ",\n".join(json.dumps(row) for row in kept) + "\n]\n")
    problems = [f"{r['contestant']} {r['contest']} {r['dtype']} failed: {r['error'].strip()[-200:]}" for r in failed]
    return "\n\n".join([markdown(kept), *problems])


def _file(name: str, lora: bool) -> str:
    return f"{name}_lora.json" if lora else f"{name}.json"


def markdown(rows: Sequence[Row]) -> str:
    """One table a contest and dtype, medians over the rounds, the best of them at the top."""
    groups: dict[tuple[str, str], dict[str, list[Row]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        groups[row["contest"], row["dtype"]][row["contestant"]].append(row)
    return "\n\n".join("\n".join(_table(*key, groups[key])) for key in sorted(groups))


def _table(contest: str, dtype: str, group: dict[str, list[Row]]) -> Iterator[str]:
    first = next(iter(group.values()))[0]
    by_cpu = first["cores"] < (os.cpu_count() or 1)
    rate = "tokens_per_cpu_s" if by_cpu else "tokens_per_s"
    medians = {name: _medians(rows) for name, rows in group.items()}
    best_peer = max((m[rate] for name, m in medians.items() if name.split("+")[0] != "lm"), default=float("nan"))
    unit = UNITS[contest].replace("/s", "/CPU s") if by_cpu else UNITS[contest]
    yield f"{contest}, {NAMES[contest]}, {dtype}{', a quarter of the work' if first['quick'] else ''}"
    yield ""
    yield f"| | {unit} | of the best peer | ms a step | rollout + update ms | compile s | peak MB | rounds | others |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, m in sorted(medians.items(), key=lambda item: -item[1][rate]):
        split = f"{m['rollout_ms']:.0f} + {m['update_ms']:.0f}" if "rollout_ms" in m else ""
        yield (
            f"| {name} | {m[rate]:.4g} | {m[rate] / best_peer:.2f} | {m['step_ms']:.0f} | {split} "
            f"| {m['compile_s']:.0f} | {m['peak_rss_mb']:.0f} | {len(group[name])} | {m['others']:.2f} |"
        )


def _medians(rows: Sequence[Row]) -> dict[str, float]:
    numbers = [name for name, value in rows[0].items() if isinstance(value, float | int)]
    return {name: statistics.median(row[name] for row in rows) for name in numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", help="folder of the kit; else $PEER_KIT")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contests", nargs="*", default=list(UNITS), choices=list(UNITS))
    parser.add_argument("--cores", type=int, default=0, help="pin to so many cores and rank by CPU time; 0: all cores")
    parser.add_argument("--quick", action="store_true", help="a quarter of the work")
    parser.add_argument("--only", default="", help='regular expression on "contestant dtype"')
    parser.add_argument("--lora", action="store_true", help="contest A with an adapter of rank 16, against TRL + PEFT")
    parser.add_argument("--kept", action="store_true", help="print the tables of the rows that were kept; run nothing")
    a = parser.parse_args()
    if a.kept:
        print(markdown(json.loads((HERE / "results" / _file("contests", a.lora)).read_text())))
    else:
        print(tables(a.kit, a.rounds, a.contests, a.cores, a.quick, a.only, a.lora))


if __name__ == "__main__":
    main()
