"""Trip counts of compiled while loops, from their condition, body and initial values."""

from __future__ import annotations

import math
import re

from lm.plan.hlo_text import Computation, Instruction, Module

FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
# Added to |limit - start| before it is divided by the step.
SLACK = {"LT": 0, "GT": 0, "NE": 0, "LE": 1, "GE": 1}
HOPS = 6  # copies and bitcasts to follow


def trip_count(module: Module, computation: str, loop: Instruction) -> int | None:
    """Number of iterations of a `while` instruction; None if it cannot be determined.

    JAX's loops step an integer in the carry by a constant up to a limit, which is a constant or in the carry.
    """
    known = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    compared = _compared(module, loop)
    if compared is None:
        return None
    counter, limit, direction = compared
    if counter.op == "constant" or (limit.op != "constant" and _step(module, loop, counter) == 0):
        counter, limit, direction = limit, counter, FLIPPED.get(direction, direction)
    end, start, step = _value(module, computation, loop, limit), None, _step(module, loop, counter) or 1
    if counter.op == "get-tuple-element":
        start = _initial(module, computation, loop, counter)
    if end is None or start is None or direction not in SLACK:
        return None
    towards = 1 if direction in ("LT", "LE", "NE") else -1
    distance = (end - start) * towards + SLACK[direction]
    return max(0, math.ceil(distance / abs(step))) if step * towards > 0 else 0


def _compared(module: Module, loop: Instruction) -> tuple[Instruction, Instruction, str] | None:
    """Both operands and the direction of the comparison that ends a loop's condition, also inside a fusion."""
    condition = module.computations[loop.attribute("condition") or ""]
    root = _root(condition)
    inside = condition
    outer: tuple[str, ...] = ()
    if root.op == "fusion":
        inside, outer = module.computations[root.attribute("calls") or ""], root.operands
    compare = next((i for i in inside.values() if i.op == "compare"), None) if outer else root
    if compare is None or compare.op != "compare" or len(compare.operands) != 2:
        return None

    def outside(name: str) -> Instruction:
        found = inside[name]
        return condition[outer[int(found.arguments)]] if outer and found.op == "parameter" else found

    left, right = map(outside, compare.operands)
    return left, right, compare.attribute("direction") or ""


def _value(module: Module, computation: str, loop: Instruction, limit: Instruction) -> int | None:
    if limit.op == "get-tuple-element":
        return _initial(module, computation, loop, limit)
    return int(limit.arguments) if limit.op == "constant" else None


def _initial(module: Module, computation: str, loop: Instruction, element: Instruction) -> int | None:
    """The constant initial value of an element of the carry; None if it is not a constant."""
    here = module.computations[computation]
    start = _element(here, here.get(loop.operands[0]), element)
    return int(start.arguments) if start is not None and start.op == "constant" else None


def _step(module: Module, loop: Instruction, element: Instruction) -> int:
    """Increment of an element of the carry per iteration: 0 if it is unchanged, 1 if unknown."""
    body = module.computations[loop.attribute("body") or ""]
    new = _element(body, _root(body), element)
    if new is None:
        return 1
    if new.op == "get-tuple-element" and new.attribute("index") == element.attribute("index"):
        return 0
    if new.op in ("add", "subtract"):
        for name in new.operands:
            if name in body and body[name].op == "constant":
                return int(body[name].arguments) * (1 if new.op == "add" else -1)
    return 1


def _element(computation: Computation, carry: Instruction | None, element: Instruction) -> Instruction | None:
    """The instruction at the index of `element` in a tuple, followed through copies and bitcasts."""
    if carry is None or carry.op != "tuple":
        return None
    found = computation.get(carry.operands[int(element.attribute("index") or 0)])
    for _ in range(HOPS):
        if found is None or found.op not in ("copy", "bitcast"):
            break
        found = computation.get(found.operands[0])
    return found


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)
