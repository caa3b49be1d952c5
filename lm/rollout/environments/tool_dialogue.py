"""Questions with tools: the model may call tools, whose results are replies, until a turn without a call gives the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lm.data.chat import Message, prompt_messages
from lm.rollout.environments.expression import ExpressionError, evaluate, plain_number
from lm.rollout.environments.search import SearchIndex
from lm.rollout.environments.tools import Tool, ToolError, ToolReply, tool_replies
from lm.rollout.verifiers import EXPECTED_COLUMN, answer, expected_answer
from lm.sandbox.jail import JailLimits, find_jail, program

PASSAGES = 3  # that a search gives
PYTHON_LIMITS = JailLimits(seconds=5.0, cpu_seconds=5.0, memory_bytes=256 << 20, output_bytes=64 << 10)


class ToolDialogue:
    """Base class of environments with tools; a subclass sets `tools`.

    Rewards: `answer`, the verifier's of the last turn, 0 if that turn calls a tool. Beside it are recorded, without being a reward, whether a tool
    was called, and the fraction of calls that failed: those that were malformed, cut off, to an unknown tool, or refused by it.
    """

    columns = (EXPECTED_COLUMN,)
    tools: ClassVar[tuple[Tool, ...]] = ()
    unrewarded = ("tool_used", "tool_errors")

    @staticmethod
    def solution(task: Mapping[str, Any]) -> Sequence[str]:
        """The expected answer, without any call."""
        return [f"The answer is {expected_answer(task)}."]

    def reset(self, task: Mapping[str, Any]) -> Sequence[Message]:
        """The prompt of the row."""
        self.task, self.last, self.replies = task, "", list[ToolReply]()
        return prompt_messages(task, "the prompt")

    def step(self, completion: str) -> Sequence[Message] | None:
        """The results of the calls in a turn, one message of role tool for each; a turn without a call is the last."""
        found = tool_replies(completion, self.tools)
        self.replies += found
        self.last = "" if found else completion
        return [
            {"role": "tool", "content": one.text, **({"error": True} if one.failed else {})} for one in found
        ] or None

    def reward(self) -> dict[str, float]:
        """The reward of the answer, and what is recorded about the calls."""
        failed, calls = sum(one.failed for one in self.replies), len(self.replies)
        right = answer(self.task, self.last) if self.last else 0.0
        return {"answer": right, "tool_used": float(calls > 0), "tool_errors": failed / max(calls, 1)}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression as text."""
    try:
        return plain_number(evaluate(expression))
    except ExpressionError as error:
        raise ToolError(str(error)) from None


def run_python(code: str) -> str:
    """What a Python program prints, run in a jail, and the end of its errors."""
    found = find_jail().run(program(code), PYTHON_LIMITS)
    printed = found.stdout.decode(errors="replace").strip()
    if found.ok:
        return printed or "(the program printed nothing)"
    why = f"the program was stopped at its limit: {found.status}" if found.status != "ended" else ""
    last = found.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    raise ToolError(why or last or f"the program ended with code {found.code}")


class CalculatorDialogue(ToolDialogue):
    """Questions with a calculator, `calc`."""

    tools = (Tool("calc", "The exact value of an arithmetic expression.", {"expression": "string"}, calculate),)


class PythonDialogue(ToolDialogue):
    """Questions with Python programs, `python`, each run in a jail of its own."""

    tools = (Tool("python", "What a Python program prints.", {"code": "string"}, run_python),)


def python_dialogue() -> type[PythonDialogue]:
    """The class, if there is a jail. Raises UserError without one."""
    find_jail()
    return PythonDialogue


def search_dialogue(path: str) -> type[ToolDialogue]:
    """Questions with a search, `search`, over the rows of a JSON lines file. Raises UserError if it cannot be read."""
    index = SearchIndex.of_file(path)

    def search(query: str) -> str:
        return "\n".join(index.best(query, PASSAGES)) or "(nothing found)"

    tool = Tool("search", "The passages of a corpus that match a query best.", {"query": "string"}, search)
    return type("SearchDialogue", (ToolDialogue,), {"tools": (tool,)})
