"""Generated conversations, and what holds of every one that a chat template renders."""

import json

from hypothesis import strategies as st

from lm.data.hub.tokenizer import HubTokenizer
from lm.experiment import UserError
from tests.data.hub import small

TYPED = [
    *small.SPECIAL,
    *small.PLAIN,
    "<|assistant|>\n",
    "<|user|>",
    "\n",
    " ",
    "it",
    "é🦜",
    "{% x %}",
    "{{ y }}",
    "\U000f0000",
    "\U0010fffa",
    "\U0010fffb",
    "[",
    "<",
]
CONTENT = st.lists(st.sampled_from(TYPED) | st.text(max_size=8), max_size=5).map("".join)


@st.composite
def conversations(draw, content=CONTENT) -> list[dict]:
    """Questions and answers in turn, perhaps behind a system message; perhaps the last question is not answered."""
    turns = draw(st.integers(1, 5))
    messages = [{"role": ("user", "assistant")[number % 2], "content": draw(content)} for number in range(turns)]
    return [{"role": "system", "content": draw(content)}, *messages] if draw(st.booleans()) else messages


TOOL = {"type": "function", "function": {"name": "look_up", "description": "d", "parameters": {"type": "object"}}}


@st.composite
def tool_conversations(draw) -> tuple[list[dict], list[dict]]:
    """Questions that are answered after calls of tools, every text different, and the definitions of the tools."""
    numbers = iter(range(999))

    def text(name: str) -> str:
        return f"{name}{next(numbers)}x{draw(st.sampled_from(['', ' <|im_end|>', ' </s> it', ' [/INST]', '{}']))}"

    messages: list[dict] = [{"role": "system", "content": text("kind")}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        messages.append({"role": "user", "content": text("asked")})
        for _ in range(draw(st.integers(0, 2))):
            calls = [
                {"id": f"call{next(numbers):05}", "type": "function", "function": {"name": text("look_up").split()[0].strip("{}"),
                 "arguments": draw(st.sampled_from([{}, {"a": [1]}, {"b": {"c": text("said")}}]))}}
                for _ in range(draw(st.integers(1, 2)))
            ]  # fmt: skip
            content = draw(st.sampled_from([None, "", text("first")]))
            messages.append({"role": "assistant", "content": content, "tool_calls": calls})
            messages += [{"role": "tool", "content": text("found"), "tool_call_id": call["id"]} for call in calls]
        reasoning = {"reasoning_content": text("because")} if draw(st.booleans()) else {}
        messages.append({"role": "assistant", "content": text("answer"), **reasoning})
    return messages, [TOOL] * draw(st.integers(0, 1))


def with_text_arguments(messages: list[dict]) -> list[dict]:
    """The messages with the arguments of calls as JSON text, which one family's template takes alone."""

    def changed(call: dict) -> dict:
        return call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}

    return [
        turn | {"tool_calls": list(map(changed, turn["tool_calls"]))} if "tool_calls" in turn else turn
        for turn in messages
    ]


def check_tools(tokenizer: HubTokenizer, messages: list[dict], tools: list[dict]) -> bool:
    """What the assistant wrote, calls included, is covered by the loss and nothing else is; False where it is refused."""
    try:
        found = tokenizer.render_chat(messages, tools or None)
    except UserError as error:
        assert "\n" not in str(error)
        return False
    covered = [found.text[one.start : one.end] for one in found.spans]
    rest = "".join(found.text[a:b] for a, b in zip([0, *(one.end for one in found.spans)],
                                                   [*(one.start for one in found.spans), None], strict=True))  # fmt: skip
    for turn in messages:
        first = str(turn.get("content") or "").split("x")[0] + "x"
        if turn["role"] == "assistant":
            said = {first} - {"x"} | {call["function"]["name"] for call in turn.get("tool_calls", ())}
            for one in said:
                assert any(one in text for text in covered) or found.left_out
                assert one not in rest
        else:
            assert not any(first in text for text in covered)
            assert first in rest or f"{turn['role']} messages" in found.left_out
    assert not tools or TOOL["function"]["name"] in rest or "tool definitions" in found.left_out
    reasoned = [turn["reasoning_content"].split("x")[0] for turn in messages if "reasoning_content" in turn]
    assert all(one in "".join(covered) for one in reasoned) or "reasoning" in found.left_out
    return True


def check(tokenizer: HubTokenizer, messages: list[dict]) -> None:
    """The properties of every rendering."""
    found = tokenizer.render_chat(messages)
    answers = [(number, turn) for number, turn in enumerate(messages) if turn["role"] == "assistant"]
    assert [one.turn for one in found.spans] == [number for number, _ in answers]
    ends = {name for name, index in tokenizer.special_ids.items() if index in tokenizer.end_ids}
    for one, (_, turn) in zip(found.spans, answers, strict=True):
        said, end = found.text[one.start : one.text_end], found.text[one.text_end : one.end]
        assert end.strip() in ends
        assert turn["content"].strip() in said or "</think>" in turn["content"]
        assert said.strip() in turn["content"] or said.strip().startswith("<think>")
    special = set(tokenizer.special_ids.values())
    harmless = [turn | {"content": "x"} for turn in messages]
    controls = [
        [index for index in ids if index in special] for ids in (found.tokens, tokenizer.render_chat(harmless).tokens)
    ]
    assert controls[0] == controls[1]
    assert any(found.mask) == bool(answers)
