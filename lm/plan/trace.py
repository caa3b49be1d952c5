"""A traced program (jaxpr) with its calls inlined, as a list of operations on values of known size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LOOPS = ("scan", "while", "cond")
OPAQUE = ("pallas_call", "custom_partitioning", "reduce", "sort", "reduce_window", "select_and_scatter_add")
BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclass(frozen=True, eq=False)
class Value:
    """An array of a traced program, compared by identity."""

    shape: tuple[int, ...]
    dtype: Any
    on_host: bool = False  # whether it is in the host's memory

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize if not _is_key(self.dtype) else 8

    @property
    def bytes(self) -> int:
        return self.size * self.itemsize

    @property
    def is_float(self) -> bool:
        return not _is_key(self.dtype) and jnp.issubdtype(self.dtype, jnp.floating)


@dataclass(frozen=True, eq=False)
class Op:
    """One operation; a loop also has its body, its number of iterations (`turns`), and its numbers of constants and carry."""

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    params: Mapping[str, Any]
    body: TracedBlock | None = None
    turns: int = 1
    constants: int = 0
    carry: int = 0


@dataclass(frozen=True, eq=False)
class TracedBlock:
    inputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Value, ...]


def block_of(jaxpr: Any) -> TracedBlock:
    """Convert a (closed) jaxpr to a block, with calls inlined and operations without readers removed."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    names = {variable: _value(variable) for variable in (*jaxpr.constvars, *jaxpr.invars)}
    ops: list[Op] = []
    outputs = _inline(jaxpr, names, ops)
    return TracedBlock(tuple(names[variable] for variable in jaxpr.invars), _needed(ops, outputs), outputs)


def _needed(ops: list[Op], outputs: tuple[Value, ...]) -> tuple[Op, ...]:
    """The operations whose results are read: a traced backward pass repeats more of the forward pass than it needs."""
    read, kept = set(outputs), []
    for op in reversed(ops):
        if read & set(op.outputs):
            read |= set(op.inputs)
            kept.append(op)
    return tuple(reversed(kept))


def _inline(jaxpr: Any, names: dict[Any, Value], ops: list[Op]) -> tuple[Value, ...]:
    """Append the operations of a jaxpr, with inputs from `names`, to `ops`; returns its outputs."""

    def read(atom: Any) -> Value:
        return _value(atom) if hasattr(atom, "val") else names[atom]

    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, tuple(map(read, equation.invars))
        body = _called(equation)
        if body is not None and name not in LOOPS:
            inner = dict(zip((*body.constvars, *body.invars), inputs, strict=True))
            outputs = _inline(body, inner, ops)
        else:
            outputs = tuple(map(_value, equation.outvars))
            ops.append(_operation(name, inputs, outputs, equation.params))
        names |= dict(zip(equation.outvars, outputs, strict=True))
    return tuple(map(read, jaxpr.outvars))


def _operation(name: str, inputs: tuple[Value, ...], outputs: tuple[Value, ...], params: Mapping[str, Any]) -> Op:
    if name == "scan":
        return Op(
            name, inputs, outputs, params, block_of(params["jaxpr"]), params["length"], params["num_consts"],
            params["num_carry"],
        )  # fmt: skip
    if name == "while":  # the number of iterations is unknown: counted once
        constants = params["cond_nconsts"]
        kept = inputs[constants:]
        carry = len(outputs)
        return Op(name, kept, outputs, params, block_of(params["body_jaxpr"]), 1, params["body_nconsts"], carry)
    if name == "cond":
        return Op(name, inputs[1:], outputs, params, block_of(params["branches"][-1]), 1, len(inputs) - 1, 0)
    return Op(name, inputs, outputs, params)


def _called(equation: Any) -> Any | None:
    """The jaxpr that an equation calls with its inputs; None for a primitive operation or a kernel."""
    if equation.primitive.name in OPAQUE:
        return None
    found = next((equation.params[name] for name in BODIES if equation.params.get(name) is not None), None)
    inner = getattr(found, "jaxpr", found)
    return inner if inner is not None and hasattr(inner, "eqns") else None


def _value(variable: Any) -> Value:
    aval = variable.aval
    return Value(tuple(aval.shape), aval.dtype, getattr(aval, "memory_space", None) == jax.memory.Space.Host)


def _is_key(dtype: Any) -> bool:
    return not isinstance(dtype, np.dtype)
