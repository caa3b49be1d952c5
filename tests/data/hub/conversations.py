"""Generated conversations, and what holds of every one that a chat template renders."""

from hypothesis import strategies as st

from lm.data.hub.tokenizer import HubTokenizer
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
