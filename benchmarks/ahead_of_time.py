"""Tables of step times planned ahead of time, for TPUs: `python benchmarks/ahead_of_time.py [TABLE ...] [--compile]`.

Every row is what `lm plan` says of an experiment of experiments/pods/ on a topology. By arithmetic a table takes seconds; with
--compile each row takes minutes, and is kept in benchmarks/results/, so that a table can be made a row at a time
(--row SUBSTRING). What is kept is shown with what is new.

    pods        every experiment of experiments/pods/ where it is meant to run
    goal        the two shapes that are compared with others, at the experiments' own settings
    scaling     the same rows a device on more and more of them, and on a second slice
    objectives  a DPO and a GRPO update of the 8B model
    memory      the same shapes under several rematerialisation policies: arithmetic against the compiler
    context     long rows, split over more and more devices
    lora        SFT with adapters of rank 16 on every kind of base: arithmetic against the compiler
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from lm.experiment import DPO, GRPO, SFT, Experiment, LoRA
from lm.files import load
from lm.plan.advise import plan_stage
from lm.plan.chips import parse_topology
from lm.plan.plan import Plan, by_compiler

SMALL, LARGE = "qwen3_0_6b_v5e", "llama3_8b_v5p"
SQUARES = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16")
CUBES = ("v5p:2x2x2", "v5p:2x4x4", "v5p:4x4x4", "v5p:8x8x8")


@dataclass(frozen=True)
class Row:
    """One line of a table: an experiment's first stage, changed, on slices of a topology."""

    name: str
    experiment: str
    topology: str
    slices: int = 1
    rows_per_device: int = 0  # 0: the experiment's own batch
    objective: SFT | DPO | GRPO | None = None
    lora: LoRA | None = None
    seq_len: int = 0  # 0: the experiment's own
    microbatches: int = 0
    remat: str = ""  # the experiment's own
    context: int = 1

    def plan(self) -> Plan:
        """By arithmetic."""
        experiment, topology = self.resolved(), parse_topology(self.topology, self.slices)
        return plan_stage(experiment, experiment.stages[0].name, topology)

    def resolved(self) -> Experiment:
        experiment = load(str(ROOT / "experiments" / "pods" / f"{self.experiment}.py"))
        devices = parse_topology(self.topology, self.slices).devices
        changes: dict[str, Any] = {
            "batch_size": self.rows_per_device * devices,
            "objective": self.objective,
            "lora": self.lora,
            "seq_len": self.seq_len,
            "microbatches": self.microbatches,
        }
        changes = {name: value for name, value in changes.items() if value}
        model = dataclasses.replace(experiment.model, **({"remat": self.remat} if self.remat else {}))
        stage = dataclasses.replace(experiment.stages[0], **changes)
        model = dataclasses.replace(model, max_len=max(model.max_len, stage.seq_len))
        mesh = dataclasses.replace(experiment.mesh, context=self.context)
        return dataclasses.replace(experiment, model=model, mesh=mesh, stages=(stage,))


TABLES: dict[str, tuple[Row, ...]] = {
    "pods": tuple(
        Row(f"{experiment}, {topology}", experiment, topology)
        for experiment, topology in (
            (SMALL, "v5e:4x4"), (LARGE, "v5p:2x4x4"), ("llama3_8b_v6e", "v6e:4x4"), ("llama2_70b_v5p", "v5p:4x4x4"),
        )
    ),
    "goal": (
        Row("0.6B, v5e 4x4", SMALL, "v5e:4x4"),
        Row("0.6B, v5e 4x4, remat minimal", SMALL, "v5e:4x4", remat="minimal"),
        Row("8B, v5p 2x4x4", LARGE, "v5p:2x4x4"),
    ),
    "scaling": (
        *(Row(f"0.6B, {name}", SMALL, name, rows_per_device=4) for name in SQUARES),
        Row("0.6B, 2 slices of v5e:4x4", SMALL, "v5e:4x4", slices=2, rows_per_device=4),
        *(Row(f"8B, {name}", LARGE, name, rows_per_device=2) for name in CUBES),
        Row("8B, 2 slices of v5p:2x4x4", LARGE, "v5p:2x4x4", slices=2, rows_per_device=2),
    ),
    "objectives": (
        Row("8B DPO, a pair of 4,096 a device", LARGE, "v5p:2x4x4", rows_per_device=1, objective=DPO(), seq_len=4096),
        Row(
            "8B GRPO, 8 completions of 2,048 a device", LARGE, "v5p:2x4x4", rows_per_device=1, seq_len=2048, microbatches=4,
            objective=GRPO(group_size=8, max_new_tokens=1024, kl_coef=0.001),
        ),
    ),
    "memory": (
        *(Row(f"0.6B, v5e 4x4, remat {r}", SMALL, "v5e:4x4", rows_per_device=4, remat=r) for r in ("full", "minimal", "dots")),
        Row("8B, v5p 2x4x4, remat dots", LARGE, "v5p:2x4x4", rows_per_device=2, remat="dots"),
    ),
    "context": tuple(
        Row(f"0.6B, v5e 4x4, 16 rows of 8,192, context {c}", SMALL, "v5e:4x4", rows_per_device=1, seq_len=8192, context=c)
        for c in (1, 2, 4)
    ),
    "lora": tuple(
        Row(f"0.6B, v5e 2x2, {name}", SMALL, "v5e:2x2", rows_per_device=1, remat="full", objective=SFT(), lora=lora)
        for name, lora in (
            *((f"LoRA, base {base}", LoRA(rank=16, base=base)) for base in ("model", "bfloat16", "int8", "nf4")),
            ("DoRA, base model", LoRA(rank=16, dora=True)), ("DoRA, base nf4", LoRA(rank=16, dora=True, base="nf4")),
            ("all weights", LoRA()),
        )
    ),
}  # fmt: skip
KEPT = (
    "topology", "slices", "mesh", "source", "fits", "devices", "hbm_bytes_per_device", "update_ms", "bound_ms", "mfu",
    "tokens_per_s_per_device", "compile_s", "compile_cpu_s", "compiler", "time_ms", "sampler",
)  # fmt: skip


def tables(
    names: Sequence[str] = tuple(TABLES), compiled: bool = False, only: str = "", libtpu: str | None = None
) -> str:
    """Make the rows anew (those whose name contains `only`), keep them, and give the tables as Markdown."""
    return "\n\n".join(f"### {name}\n\n{markdown(name, _made(name, compiled, only, libtpu))}" for name in names)


def _made(table: str, compiled: bool, only: str, libtpu: str | None) -> dict[str, dict[str, Any]]:
    """row -> "analytic" or a compiler's name -> what was planned, with what was kept before."""
    file = RESULTS / f"ahead_of_time_{table}.json"
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
    for row in TABLES[table]:
        if only not in row.name:
            continue
        plan = row.plan()
        for found in [plan, by_compiler(plan, libtpu=libtpu)] if compiled else [plan]:
            described = found.to_json()
            kept = {name: described[name] for name in KEPT} | {"commit": _commit()}
            results.setdefault(row.name, {})[found.compiler or found.source] = kept
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")  # after each row: one may take ten minutes
    return results


def _commit() -> str:
    """The commit whose step is planned, with a + where files differ from it."""
    words = ("git", "-C", str(ROOT), "describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*")
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def markdown(table: str, results: dict[str, dict[str, Any]]) -> str:
    """A table of what is kept, one line a row and source."""
    head = "| | source | fits | GB | ms an update | bound | MFU | tokens/s a device | compile CPU s | commit |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *_lines(table, results)])


def _lines(table: str, results: dict[str, dict[str, Any]]) -> Iterator[str]:
    for row in TABLES[table]:
        for source, r in sorted(results.get(row.name, {}).items()):
            growth = _growth(table, row, r, results, source)
            compiling = f"{r['compile_cpu_s']:.0f}" if r["compile_cpu_s"] else ""
            yield (
                f"| {row.name} | {source} | {'yes' if r['fits'] else 'no'} | {r['hbm_bytes_per_device'] / 1e9:.1f} "
                f"| {r['update_ms']:,.0f}{growth} | {r['bound_ms']:,.0f} | {r['mfu']:.1%} "
                f"| {r['tokens_per_s_per_device']:,.0f} | {compiling} | {r['commit']} |"
            )
            if r["sampler"]:
                s = r["sampler"]
                yield (
                    f"| its rollout, at most {s['tokens_per_s_per_device']:,.0f} tokens/s a device | analytic | "
                    f"| {s['hbm_bytes_per_device'] / 1e9:.1f} | {1e3 * s['rollout_s']:,.0f} | | | | | |"
                )


def _growth(table: str, row: Row, found: dict[str, Any], results: dict[str, dict[str, Any]], source: str) -> str:
    """By how much an update takes longer than on the smallest slice of the same experiment."""
    first = next(other for other in TABLES[table] if other.experiment == row.experiment)
    base = results.get(first.name, {}).get(source)
    if table != "scaling" or base is None or first is row:
        return ""
    return f" ({found['update_ms'] / base['update_ms'] - 1:+.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", choices=[[], *TABLES], help="all, if none is named")
    parser.add_argument("--compile", action="store_true", help="ask the TPU compiler too")
    parser.add_argument("--row", default="", metavar="SUBSTRING", help="only rows whose name contains it")
    parser.add_argument("--libtpu", metavar="PATH", help="another compiler than the one that jax runs, as of lm plan")
    arguments = parser.parse_args()
    print(tables(arguments.tables or tuple(TABLES), arguments.compile, arguments.row, arguments.libtpu))


if __name__ == "__main__":
    main()
