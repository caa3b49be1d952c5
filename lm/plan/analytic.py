"""Analytic estimate of an update on one device, without a compiler: memory, time, and the resource that bounds it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import jax
from flax import nnx

from lm.algorithms import algorithm_of
from lm.algorithms.state import flops_per_token
from lm.plan.kernels import HOST_RATE
from lm.plan.one_device import analysis_of, cast_bytes, gradient_block, parameter_bytes, update_block
from lm.plan.program import Program
from lm.plan.traffic import NETWORK, Traffic, traffic
from lm.plan.usage import Usage


@dataclass(frozen=True)
class Memory:
    """Bytes on one device: persistent state (parameters to batch), then temporaries at the moment of peak use."""

    parameters: int
    optimizer: int
    reference: int
    batch: int
    casts: int
    gathered: int
    gradients: int
    activations: int
    logits: int
    working: int

    @property
    def state(self) -> int:
        return self.parameters + self.optimizer + self.reference

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class DeviceEstimate:
    """Analytic estimate of an update on one device: FLOPs as executed, bytes, and seconds of each resource by itself."""

    memory: Memory
    product_flops: float
    kernel_flops: float
    moved: float
    compute_s: float
    memory_s: float
    host_s: float
    network_s: float
    step_s: float
    traffic: tuple[Traffic, ...]
    unpriced_kernels: tuple[str, ...]

    @property
    def bound_s(self) -> float:
        """Lower bound of the step time: the slowest resource, with perfect overlap of the others."""
        return max(self.compute_s, self.memory_s, self.host_s, self.network_s)


def estimate(program: Program) -> DeviceEstimate:
    """Estimate memory and time of a stage's update."""
    state, counted = program.state, set[int]()
    analysis = analysis_of(program)
    gradient = analysis.usage(*gradient_block(program))
    update = analysis.in_parts(update_block(program))
    memory = Memory(
        parameters=parameter_bytes(state.models, program, counted),
        optimizer=parameter_bytes((state.opt_state, state.carry), program),
        reference=parameter_bytes(state.frozen, program, counted),
        batch=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.batch())) // program.devices,
        **_peak(gradient, update, _casts(program)),
    )
    wires = traffic(program, gradient)
    chip = program.topology.chip
    inside = sum(item.seconds for item in wires if NETWORK not in item.axes)
    across = sum(item.seconds for item in wires if NETWORK in item.axes)
    moved = gradient.moved + update.moved
    host = gradient.hosted / HOST_RATE
    compute = gradient.compute_s + update.compute_s
    return DeviceEstimate(
        memory=memory,
        product_flops=gradient.product_flops + update.product_flops,
        kernel_flops=gradient.kernel_flops,
        moved=moved,
        compute_s=compute,
        memory_s=moved / chip.hbm_rate,
        host_s=host,
        network_s=max(inside, across),
        step_s=max(gradient.seconds + update.seconds + inside + across, host),  # copies to the host overlap the rest
        traffic=tuple(wires),
        unpriced_kernels=tuple(sorted(gradient.kernels)),
    )


def repeated_bytes(program: Program) -> int:
    """Bytes on one device that the arguments of a step have more than its state, because some are the same array."""
    state = program.state.models, program.state.frozen
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return sum(parameter_bytes(leaf, program) for leaf in leaves) - parameter_bytes(state, program)


def _casts(program: Program) -> int:
    """Bytes of the layers' weights cast to the compute dtype, including frozen models used in the microbatch loop."""
    state, stage = program.state, program.stage
    again = stage.microbatches > 1 and algorithm_of(stage).extra_forward_passes(stage.objective) > 0
    return cast_bytes(state.models, program) + (cast_bytes(state.frozen, program) if again else 0)


def model_flops(program: Program) -> float:
    """Model FLOPs of an update on one device, as counted for MFU (without recomputation)."""
    once = flops_per_token(program.stage, program.model, program.vocab_size, program.before)
    return once * program.tokens_per_device


def _peak(gradient: Usage, update: Usage, casts: int) -> dict[str, int]:
    """Bytes of temporaries by kind at the moment of peak use, in the gradient computation or the optimizer update.

    Args:
        casts: bytes of the layers' weights cast to the compute dtype, which live during the loops over layers.
    """
    largest = max((gradient.peak + Counter(casts=casts), update.peak), key=lambda kinds: sum(kinds.values()))
    return {
        kind: largest.get(kind, 0) for kind in ("casts", "gathered", "gradients", "activations", "logits", "working")
    }
