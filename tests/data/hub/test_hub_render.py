"""Conversations through chat templates: what the mask covers, what typed control tokens are, what is dropped."""

import pytest
from hypothesis import HealthCheck, given, settings

from lm.data.hub.tokenizer import HubTokenizer
from lm.experiment import UserError
from tests.data.hub import small
from tests.data.hub.conversations import check, conversations

TALK = [
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "the answer"},
    {"role": "user", "content": "  a question\n"},
    {"role": "assistant", "content": " 1 + 2 = 3 "},
]


@pytest.mark.parametrize("name", small.TEMPLATES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(messages=conversations())
def test_of_any_conversation_the_mask_covers_the_answers(name, messages):
    check(small.tokenizer(small.TEMPLATES[name]), messages)


@settings(max_examples=40)
@given(messages=conversations())
def test_derived_spans_are_those_of_generation_blocks(messages):
    derived, written = small.tokenizer(small.CHATML), small.tokenizer(small.BLOCKS)
    found, known = derived.render_chat(messages), written.render_chat(messages)
    assert (found.text, found.tokens, found.mask, found.spans) == (known.text, known.tokens, known.mask, known.spans)


@pytest.mark.parametrize("name", small.TEMPLATES)
def test_the_mask_covers_answers_with_their_end_tokens(name):
    tokenizer = small.tokenizer(small.TEMPLATES[name])
    found = tokenizer.render_chat(TALK)
    learnt = tokenizer.decode([i for i, on in zip(found.tokens, found.mask, strict=True) if on], specials=True)
    pieces = [found.text[one.start : one.end] for one in found.spans]
    assert learnt.replace("\n", "") == "".join(pieces).replace("\n", "")
    assert "the answer<" in learnt and "1 + 2 = 3" in learnt and "question" not in learnt


def test_flags_take_turns_and_end_tokens_out_of_the_loss():
    tokenizer = small.tokenizer()
    end = tokenizer.special_ids["<|im_end|>"]
    flagged = [TALK[0], TALK[1] | {"train": False}, *TALK[2:]]
    whole, less, no_end = (
        tokenizer.render_chat(TALK),
        tokenizer.render_chat(flagged),
        tokenizer.render_chat(TALK, learn_end=False),
    )
    assert whole.tokens == less.tokens == no_end.tokens
    assert sum(less.mask) < sum(whole.mask) and less.mask[-5:] == whole.mask[-5:]
    assert [i for i, (token, on) in enumerate(zip(whole.tokens, whole.mask, strict=True)) if token == end and on] != []
    assert not any(on for token, on in zip(no_end.tokens, no_end.mask, strict=True) if token == end)
    assert all(tokenizer.render_chat(TALK, loss_on="all").mask)


def test_a_generation_prompt_is_a_prefix_of_the_answer():
    tokenizer = small.tokenizer()
    prompt = tokenizer.render_chat(TALK[:3], generation_prompt=True)
    assert tokenizer.render_chat(TALK).tokens[: len(prompt.tokens)] == prompt.tokens
    assert not any(prompt.mask)
    assert tokenizer.render_chat(TALK).last_start == len(prompt.tokens)


def test_typed_control_tokens_become_tokens_where_that_is_asked_for():
    typed = [{"role": "user", "content": "a<|im_end|>b"}, TALK[1]]
    text, token = small.tokenizer(), small.tokenizer(typed_control="token")
    end = text.special_ids["<|im_end|>"]
    assert text.render_chat(typed).tokens.count(end) == 2
    assert token.render_chat(typed).tokens.count(end) == 3
    assert text.render_chat(typed).text == token.render_chat(typed).text
    assert end in token.encode("<|im_end|>") and end not in text.encode("<|im_end|>")


def test_a_thought_is_tokens_of_the_assistants_and_text_of_the_users():
    tokenizer = small.tokenizer(small.CHATML + "{# <think> </think> #}")
    think = tokenizer.encode("<think>")
    assert len(think) == 1
    talk = [{"role": "user", "content": "<think>"}, {"role": "assistant", "content": "<think>1</think>2"}]
    assert tokenizer.render_chat(talk).tokens.count(think[0]) == 1


def test_what_a_template_drops_is_named():
    system = {"role": "system", "content": "be kind"}
    trimmed, thinking = small.tokenizer(small.TRIMMED), small.tokenizer(small.THINKING)
    assert trimmed.render_chat([system, *TALK]).left_out == ("system messages",)
    assert trimmed.render_chat([system, *TALK[:3]]).left_out == ()
    reasoned = [TALK[0], TALK[1] | {"reasoning_content": "because"}, *TALK[2:]]
    assert thinking.render_chat(reasoned).left_out == ("reasoning",)


@pytest.mark.parametrize("answer", ["why</think>\n", "</think> \n\n", "<think>\nwhy\n</think>\n\n "])
def test_white_space_behind_a_thought_is_an_answer_of_its_own(answer):
    """The template strips the white space at its start, behind the tag."""
    tokenizer = small.tokenizer(small.THINKING)
    check(tokenizer, [TALK[0], {"role": "assistant", "content": answer}])
    check(tokenizer, [TALK[0], {"role": "assistant", "content": answer}, *TALK[2:]])


CALLS = [
    TALK[0],
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]},
    {"role": "tool", "content": "a result"},
    TALK[1],
]
WITHOUT_TOOLS = small.ROLES_AS_TEXT.replace("in messages", "in messages if m.role != 'tool'").replace(
    "m.content }}", "(m.content or '') }}"
)


@pytest.mark.parametrize("content", ["", None])
def test_an_answer_whose_call_the_template_drops_is_a_turn_of_its_own(content):
    """Else the next answer would begin at the end token of the empty one, before its own header."""
    tokenizer = small.tokenizer(WITHOUT_TOOLS)
    found = tokenizer.render_chat([CALLS[0], CALLS[1] | {"content": content}, *CALLS[2:]])
    pieces = [found.text[one.start : one.end] for one in found.spans]
    assert pieces == ["<|endoftext|>", "the answer<|endoftext|>"]
    assert found.left_out == ("tool messages", "tool calls")


def test_a_header_behind_the_end_of_a_message_that_is_not_found_is_refused():
    """The template has a text of its own for empty contents, so that a mark cannot show where that message is."""
    tokenizer = small.tokenizer(WITHOUT_TOOLS.replace("m.content or ''", "m.content or '...'"))
    with pytest.raises(UserError, match=r"turn 4: .* a message without text ends between it and its header"):
        tokenizer.render_chat(CALLS)


def test_straddling_tokens_are_counted():
    template = small.CHATML.replace("'\n' + m.content", "'\n' + m.content").replace("<|im_end|>\n", "\n<|im_end|>")
    assert small.tokenizer(small.ROLES_AS_TEXT).render_chat(
        [TALK[0], {"role": "assistant", "content": "\n\nit"}]
    ).straddling in (0, 1)
    assert small.tokenizer(template).render_chat(TALK).straddling == 0


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", None),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "without a token"),
        ("{% for m in messages %}{{ m.content | length }}<|im_end|>{% endfor %}", "cannot be located"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}", "turn 2"),
        (
            "{% for m in messages %}{{ m.content }}{% if m.content != 'the answer' %}<|im_end|>{% endif %}{% endfor %}",
            "cannot be located",
        ),
    ],
)
def test_where_the_answer_cannot_be_located_the_conversation_is_refused(template, said):
    tokenizer = HubTokenizer(small.files(template))
    if said is None:
        assert tokenizer.render_chat(TALK[:2]).spans
        return
    with pytest.raises(UserError, match=said) as error:
        tokenizer.render_chat(TALK[:2])
    assert "\n" not in str(error.value)
