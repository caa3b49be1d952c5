"""Ids, texts and masks of published tokenizers and chat templates, as the libraries of the models give them."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings

from lm.data import bad_rows, chat
from lm.data.bad_rows import BadRow
from lm.data.tokens import KINDS, encode
from lm.experiment import UserError
from tests.data.hub import published
from tests.data.hub.conversations import check, check_tools, conversations, tool_conversations, with_text_arguments

MISSING = "no tokenizers of published models (option --models DIR)"


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        missing = pytest.param("none", marks=pytest.mark.skip(reason=MISSING))
        metafunc.parametrize("family", published.families(metafunc.config) or [missing], scope="module")


@pytest.fixture(scope="module")
def folder(models, family):
    return models / "tokenizers" / family


def types_control(tokenizer, case) -> bool:
    """Whether somebody spells a control token in the conversation."""
    said = json.dumps([case["messages"], case.get("tools")], ensure_ascii=False)
    return any(name in said for name in tokenizer.control_names)


def arguments(case) -> dict:
    return {"messages": case["messages"], "tools": case.get("tools"), "variables": case.get("template_kwargs")}


def spans_of(rendered) -> list[list[int]]:
    return [[one.start, one.end] for one in rendered.spans]


def test_strings_have_the_ids_of_the_library(folder):
    known, library = published.cases(folder), published.tokenizer(folder, "token")
    assert library.vocab_size == known["vocab_size"]
    for case in known["strings"]:
        assert library.encode(case["text"]) == case["ids"], case["name"]
        assert library.encode(case["text"], special_tokens=True) == case["ids_with_special"], case["name"]
        assert library.decode(case["ids"], specials=True) == case["decoded"], case["name"]
        assert library.decode(case["ids"]) == case["decoded_skip_special"], case["name"]
    texts = [case["text"] for case in known["strings"]]
    assert library.encode_batch(texts) == [case["ids"] for case in known["strings"]]


def test_strings_without_control_tokens_have_the_same_ids_where_typed_ones_are_text(folder):
    known, tokenizer = published.cases(folder), published.tokenizer(folder)
    assert tokenizer.vocab_size == known["vocab_size"]
    for case in known["strings"]:
        assert tokenizer.decode(case["ids"], specials=True) == case["decoded"], case["name"]
        assert tokenizer.decode(case["ids"]) == case["decoded_skip_special"], case["name"]
        if not any(name in case["text"] for name in tokenizer.control_names):
            assert tokenizer.encode(case["text"]) == case["ids"], case["name"]
    texts = [case["text"] for case in known["strings"]]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_a_typed_control_token_is_text(folder):
    tokenizer = published.tokenizer(folder)
    special = set(tokenizer.special_ids.values())
    for name in tokenizer.special_ids:
        ids = tokenizer.encode(f"a {name} b")
        assert not special & set(ids) - {tokenizer.unk_id}
        assert name in tokenizer.decode(ids)


@pytest.mark.slow
def test_conversations_have_the_text_ids_and_mask_of_the_template(folder):
    known = published.cases(folder)
    for typed in ("token", "text"):
        tokenizer = published.tokenizer(folder, typed)
        for case in known.get("conversations", ()):
            found = tokenizer.render_chat(**arguments(case))
            assert found.text == case["text"], case["name"]
            if case["assistant_mask"] is not None:
                assert spans_of(found) == case["assistant_spans"], case["name"]
            prompt = tokenizer.render_chat(**arguments(case), generation_prompt=True)
            assert prompt.text == case["text_with_generation_prompt"], case["name"]
            if typed == "text" and types_control(tokenizer, case):
                continue
            assert found.tokens == case["ids"], case["name"]
            assert prompt.tokens == case["ids_with_generation_prompt"], case["name"]
            if case["assistant_mask"] is not None:
                assert found.mask == case["assistant_mask"], case["name"]
                assert found.straddling == len(case.get("tokens_straddling_a_span_edge", ())), case["name"]


def test_typed_control_tokens_make_no_turn(folder):
    tokenizer = published.tokenizer(folder)
    checked = [case for case in published.cases(folder).get("conversations", ()) if "types" in case["name"]]
    special = set(tokenizer.special_ids.values())

    def count(ids: list[int]) -> list[int]:
        return [index for index in ids if index in special]

    for case in checked:
        harmless = [turn | {"content": "x"} for turn in case["messages"]]
        assert count(tokenizer.render_chat(case["messages"]).tokens) == count(tokenizer.render_chat(harmless).tokens)


def test_refused_conversations_are_refused_in_one_line(folder):
    tokenizer = published.tokenizer(folder)
    for case in published.cases(folder).get("refused", ()):
        with pytest.raises(UserError) as error:
            tokenizer.render_chat(**arguments(case))
        assert "\n" not in str(error.value)
        if case["error_type"] == "TemplateError":
            assert case["error"] in str(error.value)
            assert "line" in str(error.value)


def test_generation_blocks_give_the_mask(folder):
    if not published.has(folder, "cases_generation_tag.json"):
        pytest.skip(f"{folder.name} has no template with generation blocks")
    known = published.cases(folder, "cases_generation_tag.json")
    template = published.read(folder / known["template"]).decode()
    tokenizer = published.tokenizer(folder, "token", template=template)
    for case in known["conversations"]:
        found = tokenizer.render_chat(**arguments(case))
        assert (found.text, found.tokens, found.mask) == (case["text"], case["ids"], case["assistant_mask"]), case[
            "name"
        ]


def test_a_sentencepiece_model_gives_the_ids_of_its_tokenizer_json(folder):
    if not published.has(folder, "tokenizer.model"):
        pytest.skip(f"{folder.name} has no sentencepiece model")
    known, tokenizer = published.cases(folder), published.of_sentencepiece(folder)
    other = published.tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.end_ids, tokenizer.pad_id) == (
        other.vocab_size,
        other.end_ids,
        other.pad_id,
    )
    for case in known["strings"]:
        # A prefix before a space is one of the things that the library and sentencepiece do differently.
        if not any(name in case["text"] for name in other.added_names) and not case["text"].startswith((" ", "\u2581")):
            assert tokenizer.encode(case["text"]) == case["ids"], case["name"]
            assert tokenizer.decode(case["ids"], specials=True) == case["decoded"], case["name"]
    for case in known.get("conversations", ()):
        if not types_control(other, case):
            found = tokenizer.render_chat(**arguments(case))
            assert (found.tokens, found.mask) == (case["ids"], case["assistant_mask"]), case["name"]


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(messages=conversations())
@example(messages=[{"role": "user", "content": ""}, {"role": "assistant", "content": "\n"}])  # stripped at one end
def test_of_any_conversation_the_mask_covers_the_answers(folder, messages):
    tokenizer = published.tokenizer(folder)
    try:
        tokenizer._reader("default").template.render(messages)
    except UserError as error:
        assert "refuses" in str(error) or "no chat template" in str(error)
        return
    check(tokenizer, messages)


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(talk=tool_conversations())
def test_of_any_conversation_with_tools_the_mask_covers_what_the_assistant_wrote(folder, talk):
    tokenizer, (messages, tools) = published.tokenizer(folder), talk
    if not check_tools(tokenizer, messages, tools):
        check_tools(tokenizer, with_text_arguments(messages), tools)


def test_rows_have_the_ids_and_mask_of_the_template(folder):
    tokenizer = published.tokenizer(folder, "token")
    for case in published.cases(folder).get("conversations", ()):
        answered = case["messages"][-1].get("role") == "assistant"
        if case.get("template_kwargs") or not all(
            isinstance(turn.get("content") or "", str) for turn in case["messages"]
        ):
            continue
        row = {"messages": case["messages"], "tools": json.dumps(case.get("tools"))}
        try:
            if answered:
                made = encode(KINDS["conversations"], tokenizer, [(row, "here")], drop=False)
            else:
                prompt = chat.prompt_messages(row, "here"), tokenizer, True
        except BadRow as error:
            assert error.reason == bad_rows.TURNS, case["name"]
            continue
        if not answered:
            found = chat.render(*prompt, tools=chat.tools_of(row, "here")).tokens
            assert found == case["ids_with_generation_prompt"], case["name"]
            continue
        assert made["tokens"].tolist() == case["ids"], case["name"]
        assert case["assistant_mask"] in (None, made["mask"].tolist()), case["name"]


def test_golden_conversations_have_the_ids_and_mask_of_the_library(golden):
    folder = golden / "chat"
    text, token = published.tokenizer(folder), published.tokenizer(folder, "token")
    for case in json.loads((folder / "conversations.json").read_text())["conversations"]:
        tokenizer = token if types_control(text, case) else text
        found = tokenizer.render_chat(case["messages"])
        assert (found.text, found.tokens, found.mask) == (case["text"], case["input_ids"], case["assistant_masks"])
        prompt = tokenizer.render_chat(case["messages"], generation_prompt=True)
        assert prompt.tokens == case["input_ids_generation_prompt"]
        assert tokenizer.decode(found.tokens, specials=True) == case["decoded"]


def test_a_small_models_prompts_have_its_ids_by_either_file(models):
    folder = models / "stories260k"
    if not published.has(folder, "golden.json"):
        pytest.skip(f"no {folder} (option --models DIR)")
    ends = published.cases(folder, "generation_config.json")["eos_token_id"]
    for tokenizer in (published.tokenizer(folder), published.of_sentencepiece(folder)):
        assert tokenizer.end_ids[: len(ends)] == tuple(ends)
        for case in published.cases(folder, "golden.json")["prompts"]:
            assert tokenizer.encode(case["text"], special_tokens=True) == case["ids"]
            assert [tokenizer.document_ids[0], *tokenizer.encode(case["text"])] == case["ids"]
            assert tokenizer.decode(case["ids"] + case["greedy_ids"]) == case["text_with_prompt"]
