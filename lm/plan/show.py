"""Formats plans as text for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from lm.plan.advise import Change
from lm.plan.plan import Plan

WIDTH = 80
GB = 1e9


def show(plan: Plan, largest_batch: int | None) -> str:
    """Text of one plan: memory, time and its bound, collectives by axis, sampler, notes."""
    program = plan.program
    topology = program.topology
    slices = f"{topology.slices} x " if topology.slices > 1 else ""
    how = f"by {plan.compiler or 'the compiler'}" if plan.source == "compiled" else "by arithmetic"
    head = f"stage {program.stage.name} on {slices}{topology.name} ({topology.devices} devices), {how}"
    lines = [head, f"mesh {layout(plan)}", _settings(plan), ""]
    lines += [*_memory(plan, largest_batch), "", *_time(plan), "", *_collectives(plan)]
    if plan.sampling:
        lines += ["", *_sampler(plan)]
    for note in plan.notes:
        lines += textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join(lines)


def overview(plans: Sequence[Plan], first: str, names: Iterable[str]) -> str:
    """A table with one line per plan."""
    rows = [(first, "fits", "GB", "ms/step", "bound", "MFU", "tokens/s")]
    for name, plan in zip(names, plans, strict=False):
        rows.append(
            (name, _yes(plan.fits), f"{plan.bytes / GB:.2f}", _ms(plan.step_s), _ms(plan.bound_s), f"{plan.mfu:.1%}",
             f"{plan.tokens_per_s:,.0f}")
        )  # fmt: skip
    return "\n".join(table(rows))


def advice(changes: Sequence[Change], limit: int) -> str:
    """A table of the changes that make a stage fit, as command-line words."""
    if not changes:
        return "no change that was tried makes it fit: use larger chips, or a smaller model"
    heads = ("changes that make it fit", "the same on more devices", "the same with a smaller batch")
    lines = []
    for rank, head in enumerate(heads):
        of_rank = [change for change in changes if change.rank == rank][:limit]
        if of_rank:
            rows = [(head, "GB", "ms/step", "tokens/s")]
            rows += [
                (" ".join(c.words), f"{c.plan.bytes / GB:.2f}", _ms(c.plan.step_s), f"{c.plan.tokens_per_s:,.0f}")
                for c in of_rank
            ]
            lines += [*table(rows), ""]
    return "\n".join(lines[:-1])


def layout(plan: Plan) -> str:
    """The mesh axes larger than 1 as text, such as `fsdp 8 x tensor 2`."""
    used = [f"{axis} {size}" for axis, size in plan.program.sizes.items() if size > 1]
    return " x ".join(used) or "of one device"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align rows in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _settings(plan: Plan) -> str:
    """What a step trains: rows of tokens, and the weights or an adapter."""
    stage, model = plan.program.stage, plan.program.model
    what = f"LoRA of rank {stage.lora.rank}" if stage.lora.rank else "all weights"
    return f"{plan.program.rows} rows of {stage.seq_len:,} tokens, {what} ({model.param_dtype}), remat {model.remat}"


def _memory(plan: Plan, largest_batch: int | None) -> list[str]:
    compiled = plan.source == "compiled"
    shown = {name: size for name, size in vars(plan.memory).items() if size}
    rows = [("memory per device, GB", "by arithmetic")]
    rows += [(f"  {name}", f"{size / GB:.3f}") for name, size in shown.items()]
    rows += [("  total", f"{plan.memory.total / GB:.3f}")]
    rows += [("  total, by the compiler", f"{plan.update_bytes / GB:.3f}")] if compiled else []
    rows += (
        [("  total during a rollout", f"{(plan.memory.state + plan.sampling.peak_bytes) / GB:.3f}")]
        if plan.sampling
        else []
    )
    rows += [("  available", f"{plan.limit / GB:.3f}")]
    batch = f"{plan.program.stage.name}.batch_size {plan.program.stage.batch_size}"
    most = f"largest that fits: {largest_batch}" if largest_batch else "not even the smallest fits"
    verdict = f"fits: {_yes(plan.fits)}; {batch}, {most}"
    return [*table(rows), *textwrap.wrap(verdict, WIDTH)]


def _time(plan: Plan) -> list[str]:
    rows = [("time per update, ms", "")]
    rows += [(f"  {name}", _ms(seconds)) for name, seconds in plan.parts_s.items() if seconds]
    rows += [("  update", _ms(plan.update_s)), ("  lower bound, all overlapped", _ms(plan.bound_s))]
    compiled = f", compiled in {plan.compile_s:.0f} s" if plan.compile_s else ""
    return [*table(rows), f"MFU {plan.mfu:.1%}, {plan.tokens_per_s:,.0f} tokens/s per device{compiled}"]


def _collectives(plan: Plan) -> list[str]:
    rows = [("collectives per update", "devices", "MB", "ms")]
    for item in plan.collectives:
        over = f" over {'+'.join(item['axes'])}" if "axes" in item else (" beside the rest" if item["beside"] else "")
        name = f"  {item.get('what', '')} {item['kind']}{over}" if "what" in item else f"  {item['kind']}{over}"
        rows.append((name, str(item["devices"]), f"{item['bytes'] / 1e6:,.1f}", f"{item['ms']:,.2f}"))
    return table(rows) if len(rows) > 1 else ["no collectives"]


def _sampler(plan: Plan) -> list[str]:
    found = plan.sampling
    assert found is not None
    return [
        *table(
            [
                (f"sampler{_where(plan)}, by {found.compiler or 'arithmetic'}", ""),
                ("  rows at a time", f"{found.rows:g}"),
                ("  cache, GB", f"{found.cache_bytes / GB:.3f}"),
                ("  a token of every row, ms", _exact_ms(found.token_s)),
                *((f"    roofline: {name}", _exact_ms(seconds)) for name, seconds in found.roofline.items()),
                ("  tokens/s per device, at most", f"{found.tokens_per_s:,.0f}"),
                ("  weights to the sampler's layout, ms", _exact_ms(found.reshard_s)),
                ("  rollout of full length, s", f"{found.rollout_s:,.1f}"),
                ("  rollouts per step, at most", str(found.rollouts)),
                ("  trainer's log-probabilities of the completions, s", f"{found.trainer_s:,.1f}"),
                (
                    f"  step, {'the slower of the two' if plan.program.rollout.devices else 'in turns'}, s",
                    f"{plan.step_s:,.1f}",
                ),
            ]
        ),
        "",
    ]


def _where(plan: Plan) -> str:
    """Where sampling takes place if not on the devices that train."""
    alone = plan.program.rollout.devices
    return f" on {alone} devices of its own" if alone else ""


def _exact_ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}" if seconds < 10 else f"{1e3 * seconds:,.0f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
