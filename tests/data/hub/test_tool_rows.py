"""Rows with tools and reasoning, in the layouts that there are, through a published model's chat template."""

import json

import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings

from lm.data.layouts import canonical
from lm.data.pipeline import make_feed
from lm.data.prompts import make_prompt_feed
from lm.data.split import split_key
from lm.data.tokens import KINDS, encode
from lm.evals.examples import read_examples
from lm.experiment import DPO, SFT, Eval, Source, Stage, UserError
from tests.data.hub import small
from tests.data.hub.conversations import TOOL, check_tools, tool_conversations

ARGUMENTS = {"it": "a", "list": [1]}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": ARGUMENTS}}
TALK = [
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "an answer", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "it is", "reasoning_content": "so it is"},
]
ROW = {"messages": TALK, "tools": [TOOL]}
OLD = [TALK[0], {"role": "assistant", "content": None, "function_call": CALL["function"]},
       {"role": "function", "name": "look_up", "content": "an answer"}, TALK[3]]  # fmt: skip
SHARED = [{"from": "human", "value": "what is it?"}, {"from": "function_call", "value": json.dumps(CALL["function"])},
          {"from": "observation", "value": "an answer"}, {"from": "gpt", "value": "it is", "reasoning_content": "so it is"}]  # fmt: skip
SAME = {
    "tools as text": ROW | {"tools": json.dumps([TOOL])},
    "each tool as text": ROW | {"tools": [json.dumps(TOOL)]},
    "one tool": ROW | {"tools": TOOL},
    "functions": {"messages": TALK, "functions": [TOOL["function"]]},
    "messages as text": {"messages": json.dumps(TALK), "tools": [TOOL]},
    "calls as text": ROW | {"messages": [TALK[0], TALK[1] | {"tool_calls": json.dumps([CALL])}, *TALK[2:]]},
    "function_call": {"messages": OLD, "tools": [TOOL]},
    "ShareGPT": {"conversations": SHARED, "tools": json.dumps([TOOL])},
    "prompt": {"prompt": TALK[:1], "completion": TALK[1:], "tools": [TOOL]},
}


def tokens(row, tokenizer, kind="conversations"):
    columns = encode(KINDS[kind], tokenizer, [(row, "here")], drop=False)
    return columns["tokens"].tolist(), columns["mask"].tolist()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path), holdout=0.0)


def test_calls_results_and_reasoning_are_rendered_and_what_the_assistant_wrote_is_learnt():
    tokenizer = small.tokenizer(small.TOOLS)
    ids, mask = tokens(ROW, tokenizer)
    text = tokenizer.decode(ids, specials=True)
    assert text.startswith(f"<|im_start|>system\n{json.dumps([TOOL])}<|im_end|>")
    learnt = tokenizer.decode([index for index, one in zip(ids, mask, strict=True) if one], specials=True)
    call = f"<tool_call>look_up {json.dumps(ARGUMENTS)}</tool_call><|im_end|>"
    assert learnt == f"{call}<think>so it is</think>it is<|im_end|>"


@pytest.mark.parametrize("name", SAME)
def test_rows_with_tools_are_the_same_in_every_layout(name):
    row, tokenizer = SAME[name], small.tokenizer(small.TOOLS)
    assert tokens(row, tokenizer) == tokens(canonical(row), tokenizer) == tokens(ROW, tokenizer)
    assert split_key(row) == split_key({"question": "what is it?"})


def test_rows_with_tools_are_the_same_in_parquet(tmp_path):
    other = [
        TALK[0],
        TALK[1] | {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist([ROW, {"messages": other, "tools": None}]), tmp_path / "a.parquet")
    stages = [
        Stage("sft", SFT(), (source,), steps=1, batch_size=1, seq_len=512)
        for source in (
            write(tmp_path / "a.jsonl", [ROW, {"messages": other}]),
            Source(str(tmp_path / "a.parquet"), holdout=0.0),
        )
    ]
    one, two = (make_feed(stage, small.tokenizer(small.TOOLS), 0).batch(0) for stage in stages)
    assert (one.tokens == two.tokens).all() and (one.weights == two.weights).all()


def test_pairs_have_tools_and_differ_in_their_calls(tmp_path):
    tokenizer = small.tokenizer(small.TOOLS)
    other = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {}}}],
    }
    pair = {"prompt": TALK[:1], "chosen": [TALK[1]], "rejected": [other], "tools": [TOOL]}
    equal = pair | {"rejected": [TALK[1]]}
    source = write(tmp_path / "a.jsonl", [pair, equal])
    feed = make_feed(Stage("dpo", DPO(), (source,), steps=1, batch_size=1, seq_len=256), tokenizer, 0)
    assert "1 dropped (1 with equal answers)" in feed.report()
    batch = feed.batch(0)
    for ids, name in zip(batch.tokens, ("look_up", "find"), strict=True):
        assert f"<tool_call>{name}" in tokenizer.decode(ids, specials=True)
        assert json.dumps([TOOL]) in tokenizer.decode(ids)


def test_prompts_have_tools_and_may_end_with_a_result(tmp_path):
    tokenizer = small.tokenizer(small.TOOLS)
    source = write(tmp_path / "a.jsonl", [ROW, {"prompt": TALK[:3], "tools": [TOOL]}])
    batch = make_prompt_feed([source], 2, 512, tokenizer, 0).batch(0)
    for ids in batch.tokens:
        text = tokenizer.decode(ids, specials=True)
        assert json.dumps([TOOL]) in text
        assert text.endswith("<|im_start|>tool\nan answer<|im_end|>\n<|im_start|>assistant\n")


def test_evaluations_count_the_bytes_of_calls_and_reasoning(tmp_path):
    source = write(tmp_path / "a.jsonl", [ROW])
    item = Eval("talks", Source(source.path, holdout=1.0), metric="bits_per_byte", count=1)
    found = read_examples(item, small.tokenizer(small.TOOLS), 512)
    assert b"look_up" in found.texts[0] and found.texts[1] == b"so it is\nit is"


def test_what_a_template_leaves_out_of_tools_is_counted(tmp_path):
    given = [turn | {"content": turn["content"] or "it"} for turn in TALK]
    source = write(tmp_path / "a.jsonl", [{"messages": given, "tools": [TOOL]}])
    said = make_feed(Stage("sft", SFT(), (source,), steps=1, batch_size=1, seq_len=256), small.tokenizer(), 0).report()
    for name in ("tool definitions", "tool calls", "reasoning"):
        assert f"in 1 examples the chat template leaves out {name}" in said
    assert "not read by this stage: messages[].tool_call_id" in said
    asked = write(tmp_path / "b.jsonl", [{"messages": given[:3], "tools": [TOOL]}])
    assert "leaves out tool calls" in make_prompt_feed([asked], 1, 256, small.tokenizer(), 0).report()


def test_arguments_as_text_where_a_template_takes_objects_are_counted_and_the_other_way_is_told(tmp_path):
    text = [TALK[0], TALK[1] | {"tool_calls": [{"function": CALL["function"] | {"arguments": json.dumps(ARGUMENTS)}}]}]
    source = write(tmp_path / "a.jsonl", [{"messages": text}])
    stage = Stage("sft", SFT(), (source,), steps=1, batch_size=1, seq_len=256)
    assert "leaves out the structure of tool arguments" in make_feed(stage, small.tokenizer(small.TOOLS), 0).report()
    strict = small.tokenizer(small.TOOLS.replace(" | tojson + '</tool_call>'", " + '</tool_call>'"))
    assert "1 conversations" in make_feed(stage, strict, 0).report()
    write(tmp_path / "a.jsonl", [{"messages": text}, {"messages": TALK[:2]}])
    with pytest.raises(UserError, match=r"line 2: .*takes the arguments of a tool call as JSON text.*bad_rows drop"):
        make_feed(stage, strict, 0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"messages": [TALK[0], TALK[1] | {"tool_calls": [{"function": "f"}]}]},
            "turn 2: tool_calls must have the name",
        ),
        ({"messages": [TALK[0] | {"tool_calls": [CALL]}, TALK[3]]}, "turn 1: tool_calls are the assistant's"),
        ({"messages": [TALK[0], TALK[2], TALK[3]]}, "turn 2: a tool turn must follow"),
        ({"messages": TALK[:3]}, "turn 3: the last turn must be the assistant's, found the tool's"),
        (
            {"messages": [*TALK[:3], TALK[3] | {"reasoning_content": ["so"]}]},
            "turn 4: reasoning_content must be a string",
        ),
        (
            {"messages": [TALK[0], {"role": "function_call", "content": "f()"}, TALK[3]]},
            "turn 2: function_call must have",
        ),
        ({"messages": TALK, "tools": ["f"]}, "tools must be a list of tool definitions"),
        ({"messages": TALK, "tools": "[{"}, "tools is not valid JSON"),
    ],
)
def test_malformed_tools_are_refused_with_the_turn(row, said):
    with pytest.raises(UserError, match=said):
        tokens(row, small.tokenizer(small.TOOLS))


@settings(max_examples=30)
@given(talk=tool_conversations())
def test_of_any_conversation_with_tools_the_mask_covers_what_the_assistant_wrote(talk):
    assert check_tools(small.tokenizer(small.TOOLS), *talk)
