"""The `Plan` value: memory and speed of a stage on a topology, by arithmetic or by the TPU compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm.experiment import reward_names, updates_per_step
from lm.plan import analytic
from lm.plan.analytic import Memory, model_flops, repeated_bytes
from lm.plan.compiled import Compiled, OutOfMemory, compile_step, save_text
from lm.plan.compiled_sampling import compiled_sampling
from lm.plan.compiler_text import untested
from lm.plan.kernels import KERNEL_EFFICIENCY
from lm.plan.libtpu import find_libtpu
from lm.plan.program import Program
from lm.plan.sampling import Sampling, sampling

CAVEATS = {
    "analytic": "by arithmetic, without a compiler: products and memory at the chip's rates, collectives one after another; memory "
    "within 5 % of libtpu 0.0.42's for the steps of experiments/pods, DPO, GRPO and rows split over mesh.context",
    "collectives": "the compiler gives no time for collectives: modelled as a ring over all links of a chip",
    "kernels": f"nor attention kernels: modelled as executed FLOPs at {KERNEL_EFFICIENCY:.0%} of the peak",
    "sparsecore": "nor gathers on SparseCore: assumed to overlap the rest completely",
    "reward models": "reward models are counted with weights of their own; those with adapters on the policy's base share it in a run",
    "network": "transfers between slices are modelled from a host's share of the data-centre network",
}


@dataclass(frozen=True)
class Plan:
    """Memory and speed of one device in a stage; `update` is one optimizer update."""

    program: Program
    source: str  # "analytic" or "compiled"
    update_bytes: int
    update_s: float
    bound_s: float
    compile_s: float
    memory: Memory  # by arithmetic, whatever the source
    parts_s: dict[str, float]  # seconds of the parts of a step
    collectives: list[dict[str, Any]]
    sampling: Sampling | None
    notes: tuple[str, ...]
    compile_cpu_s: float = 0.0
    compiler: str = ""

    @property
    def bytes(self) -> int:
        """Peak memory: of the update, or of sampling together with the training state, where the same devices do both."""
        found = self.sampling
        if found is None:
            return self.update_bytes
        if self.program.rollout.devices:
            return max(
                self.update_bytes, self.memory.state + found.trainer_bytes, found.copy_bytes + found.sampler_bytes
            )
        return found.copy_bytes + max(self.update_bytes, self.memory.state + found.peak_bytes)

    @property
    def limit(self) -> int:
        return self.program.topology.chip.hbm_usable

    @property
    def fits(self) -> bool:
        return self.bytes <= self.limit

    @property
    def step_s(self) -> float:
        """Seconds of a step: its updates, and if it samples its rollouts at most, with the trainer's pass over them.

        Updates and rollouts take turns on the devices; on devices of their own the slower of the two counts.
        """
        found, trained = self.sampling, updates_per_step(self.program.stage) * self.update_s
        if found is None:
            return trained
        trained, sampled = trained + found.trainer_s, found.rollouts * (found.rollout_s + found.check_s)
        return max(trained, sampled) if self.program.rollout.devices else trained + sampled

    @property
    def mfu(self) -> float:
        return model_flops(self.program) / (self.program.topology.chip.peak * self.update_s)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second per device of the update, without sampling."""
        return self.program.tokens_per_device / self.update_s

    def to_json(self) -> dict[str, Any]:
        """The plan as one plain object."""
        program = self.program
        return {
            "stage": program.stage.name,
            "topology": program.topology.name,
            "slices": program.topology.slices,
            "mesh": program.sizes,
            "source": self.source,
            "fits": self.fits,
            "devices": program.topology.devices,
            "hbm_bytes_per_device": self.bytes,
            "hbm_limit_bytes": self.limit,
            "update_ms": 1e3 * self.update_s,
            "rollout_ms": 1e3 * self.sampling.rollout_s if self.sampling else 0.0,
            "rollout_tokens_per_s_per_device": self.sampling.tokens_per_s if self.sampling else 0.0,
            "step_ms": 1e3 * self.step_s,
            "bound_ms": 1e3 * self.bound_s,
            "mfu": self.mfu,
            "tokens_per_s_per_device": self.tokens_per_s,
            "compile_s": self.compile_s,
            "compile_cpu_s": self.compile_cpu_s,
            "compiler": self.compiler,
            "model_flops_per_device": model_flops(program),
            "memory_bytes": asdict(self.memory),
            "time_ms": {name: 1e3 * seconds for name, seconds in self.parts_s.items()},
            "collectives": self.collectives,
            "sampler": _sampler(self),
            "notes": list(self.notes),
        }


def by_arithmetic(program: Program) -> Plan:
    """Plan a stage by arithmetic, which takes seconds."""
    found = analytic.estimate(program)
    notes = [CAVEATS["analytic"], CAVEATS["kernels"][4:]]
    notes += [CAVEATS["network"]] if program.topology.slices > 1 else []
    notes += _caveat_of_reward_models(program)
    notes += [f"not counted, since their FLOPs are unknown: kernels {', '.join(found.unpriced_kernels)}"] * bool(
        found.unpriced_kernels
    )
    return Plan(
        program=program,
        source="analytic",
        update_bytes=found.memory.total,
        update_s=found.step_s,
        bound_s=found.bound_s,
        compile_s=0.0,
        memory=found.memory,
        parts_s={
            "compute": found.compute_s,
            "memory": found.memory_s,
            "host": found.host_s,
            "network": found.network_s,
        },
        collectives=_described(found.traffic),
        sampling=sampling(program),
        notes=tuple(notes),
    )


def by_compiler(arithmetic: Plan, hlo: Path | None = None, libtpu: str | None = None) -> Plan:
    """Refine a plan by compiling the step: the compiler's memory, and the time estimated from the compiled module.

    If the step does not fit, the compiler gives no module, and the time stays that by arithmetic.

    Args:
        hlo: file for the compiled module's text, and with `sampler_` before its name for that of sampling; None: not saved.
        libtpu: path of the compiler, see lm/plan/libtpu.py; None: the one that jax would load.

    Raises:
        UserError: there is no compiler, or no folder for the text.
    """
    program, sampled = arithmetic.program, arithmetic.sampling
    try:
        if sampled:
            sampled, text = compiled_sampling(program, sampled, libtpu)
            if hlo:
                save_text(text, hlo.with_name(f"sampler_{hlo.name}"))
        compiled = compile_step(program, libtpu)
    except OutOfMemory as error:
        compiler = find_libtpu(libtpu)
        # The compiler's message counts temporaries only, without the arguments.
        needed = error.needed + arithmetic.memory.state + arithmetic.memory.batch
        notes = (str(error), "the compiler gave no program, so the time is by arithmetic", *compiler.notes)
        notes += untested(compiler.version)
        return dataclasses.replace(
            arithmetic, source="compiled", update_bytes=needed, notes=notes, compiler=compiler.name
        )
    if hlo:
        save_text(compiled.facts.text, hlo)
    return _compiled(dataclasses.replace(arithmetic, sampling=sampled), compiled)


def _caveat_of_reward_models(program: Program) -> list[str]:
    return [CAVEATS["reward models"]] if program.stage.lora.rank and reward_names(program.stage) else []


def _compiled(arithmetic: Plan, compiled: Compiled) -> Plan:
    topology, cost, sampled = arithmetic.program.topology, compiled.facts.cost, arithmetic.sampling
    notes = [CAVEATS["collectives"], CAVEATS["kernels"]]
    notes += [CAVEATS["sparsecore"]] if topology.chip.sparse_gathers else []
    notes += [CAVEATS["network"]] if topology.slices > 1 else []
    notes += _caveat_of_reward_models(arithmetic.program)
    notes += [*compiled.compiler.notes, *compiled.facts.notes]
    notes += [f"not counted: kernels {', '.join(cost.unpriced_kernels)}"] * bool(cost.unpriced_kernels)
    notes += [f"counted as one iteration: loops {', '.join(cost.unknown_loops)}"] * bool(cost.unknown_loops)
    return Plan(
        program=arithmetic.program,
        source="compiled",
        update_bytes=compiled.facts.peak_bytes - repeated_bytes(arithmetic.program),
        update_s=cost.schedule_s,
        bound_s=cost.bound_s,
        compile_s=compiled.seconds + (sampled.compile_s if sampled else 0.0),
        memory=arithmetic.memory,
        parts_s={
            "products": cost.product_s,
            "other compute": cost.compute_s - cost.product_s,
            "kernels": cost.kernel_s,
            "without a figure": cost.unpriced_s,
            "collectives exposed": cost.sync_s,
            "collectives beside": cost.async_s,
            "host": cost.host_s,
            "between slices": cost.network_s,
        },
        collectives=_described(cost.collectives),
        sampling=sampled,
        notes=tuple(notes),
        compile_cpu_s=compiled.cpu_seconds + (sampled.compile_cpu_s if sampled else 0.0),
        compiler=compiled.compiler.name,
    )


def _described(collectives: Iterable[Any]) -> list[dict[str, Any]]:
    """The fields of each, with milliseconds for seconds."""
    fields = map(asdict, collectives)
    return [
        {name: value for name, value in x.items() if name != "seconds"} | {"ms": 1e3 * x["seconds"]} for x in fields
    ]


def _sampler(plan: Plan) -> dict[str, Any] | None:
    found = plan.sampling
    if found is None:
        return None
    return {
        "source": "compiled" if found.compiler else "analytic",
        "mesh": plan.program.sampler.sizes,
        "takes_turns": not plan.program.rollout.devices,
        "max_staleness": plan.program.stage.objective.staleness,
        "rows_per_device": found.rows,
        "cache_bytes": found.cache_bytes,
        "hbm_bytes_per_device": plan.memory.state + found.peak_bytes,
        "token_ms": 1e3 * found.token_s,
        "roofline_ms": {name: 1e3 * seconds for name, seconds in found.roofline.items()},
        "reshard_ms": 1e3 * found.reshard_s,
        "tokens_per_s_per_device": found.tokens_per_s,
        "rollout_s": found.rollout_s,
        "rollouts_per_step_at_most": found.rollouts,
        "trainer_pass_s": found.trainer_s,
    }
