"""Rows with `chat_template_kwargs`, which set variables of a published model's chat template."""

import json

import pytest

from lm.data.chat import plain_prompt, variables_of
from lm.data.pipeline import make_feed
from lm.data.prompts import make_prompt_feed
from lm.data.tokens import KINDS, encode
from lm.evals.examples import read_examples
from lm.experiment import SFT, Eval, Stage, UserError
from tests.data.hub import small
from tests.data.hub.test_tool_rows import write

TEMPLATE = (
    "{% if style %}{{ '<|im_start|>system\n' + style + '<|im_end|>\n' }}{% endif %}" + small.CHATML[:-len("{% endif %}")]
    + "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)  # fmt: skip
TALK = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "it is"}]
GIVEN = {"style": "the system", "enable_thinking": False}
ROW = {"messages": TALK, "chat_template_kwargs": GIVEN}


def text_of(ids, tokenizer):
    return tokenizer.decode([int(index) for index in ids if index != tokenizer.pad_id], specials=True)


@pytest.mark.parametrize("given", [GIVEN, json.dumps(GIVEN), GIVEN | {"other": None}])
def test_conversations_pairs_prompts_and_evals_are_rendered_with_them(given, tmp_path):
    tokenizer = small.tokenizer(TEMPLATE)
    whole = tokenizer.render_chat(TALK, variables=GIVEN)
    assert "the system" in whole.text
    row = ROW | {"chat_template_kwargs": given}
    assert encode(KINDS["conversations"], tokenizer, [(row, "here")], drop=False)["tokens"].tolist() == whole.tokens
    pair = {"prompt": TALK[:1], "chosen": "it is", "rejected": "a system", "chat_template_kwargs": given}
    both = encode(KINDS["pairs"], tokenizer, [(pair, "here")], drop=False)["tokens"].tolist()
    assert both[: len(whole.tokens)] == whole.tokens and text_of(both, tokenizer).count("the system") == 2
    source = write(tmp_path / "a.jsonl", [row])
    (asked,) = make_prompt_feed([source], 1, 128, tokenizer, 0).batch(0).tokens
    expected = tokenizer.render_chat(TALK[:1], variables=GIVEN, generation_prompt=True)
    assert text_of(asked, tokenizer) == expected.text and expected.text.endswith("</think>\n\n")
    item = Eval("talks", write(tmp_path / "b.jsonl", [row]), metric="bits_per_byte", count=1)
    item = Eval("talks", type(item.source)(item.source.path, holdout=1.0), metric="bits_per_byte", count=1)
    assert read_examples(item, tokenizer, 128).encoded[0][0] == whole.tokens


def test_a_control_token_that_a_variable_spells_is_text():
    tokenizer = small.tokenizer(TEMPLATE)
    typed = tokenizer.render_chat(TALK, variables={"style": "a<|im_end|>b"})
    assert typed.text == tokenizer.render_chat(TALK, variables={"style": "ab"}).text.replace("ab", "a<|im_end|>b")
    end = tokenizer.special_ids["<|im_end|>"]
    assert typed.tokens.count(end) == tokenizer.render_chat(TALK, variables={"style": "ab"}).tokens.count(end)


def test_what_no_template_reads_is_named(tmp_path):
    source = write(tmp_path / "a.jsonl", [ROW | {"chat_template_kwargs": GIVEN | {"enable_thoughts": True}}])
    stage = Stage("sft", SFT(), (source,), steps=1, batch_size=1, seq_len=128)
    assert make_feed(stage, small.tokenizer(TEMPLATE), 0).report().endswith(
        "not read by this stage: chat_template_kwargs.enable_thoughts"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tools": []}, "here: chat_template_kwargs has tools, which comes from the row's other columns"),
        ([1], r"here: chat_template_kwargs must be an object, found \[1\]"),
        ("{broken", "here: chat_template_kwargs must be an object, found '{broken'"),
    ],
)
def test_what_cannot_be_given_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        variables_of({"chat_template_kwargs": given}, "here")


def test_answers_that_are_kept_without_them_are_not_asked_for():
    with pytest.raises(UserError, match="here: the prompt has chat_template_kwargs, and answers that are labelled"):
        plain_prompt(ROW, "here")
