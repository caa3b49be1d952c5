"""A control token's id comes from nobody's text, whatever kind of vocabulary it is in."""

import json

import pytest
from sentencepiece import sentencepiece_model_pb2

from lm.data.hub.tokenizer import HubTokenizer, with_options
from lm.data.hub.vocabulary import CLOSE, OPEN
from lm.data.tokenizer import SubwordTokenizer
from lm.data.vocabulary import load_tokenizer, named_tokenizer
from lm.experiment import Tokenizer, UserError
from tests.data.hub import small

LETTERS = ["<", "s", ">", "/", "a", " "]
ADDED = [
    {"id": index, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for index, name in ((10, "<s>"), (11, "</s>"))
]  # fmt: skip


def made_of_merges(ignore: bool) -> dict:
    vocab = {letter: place for place, letter in enumerate(LETTERS)} | {
        "<s": 6,
        "s>": 7,
        "</": 8,
        "aa": 9,
        "<s>": 10,
        "</s>": 11,
    }
    merges = [["<", "s"], ["s", ">"], ["<", "/"], ["a", "a"], ["<s", ">"], ["</", "s>"]]
    return {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignore}


def unigram() -> dict:
    pieces = [*LETTERS, "<s", "s>", "</", "aa", "<s>", "</s>"]
    return {"type": "Unigram", "unk_id": 0, "vocab": [[piece, 0.0 if len(piece) > 2 else -9.0] for piece in pieces]}


@pytest.mark.parametrize(
    "model", [made_of_merges(False), made_of_merges(True), unigram()], ids=["merges", "whole", "unigram"]
)
def test_no_merge_and_no_piece_makes_a_control_token_of_text(model):
    files = {
        "tokenizer.json": json.dumps({"version": "1.0", "added_tokens": ADDED, "model": model}).encode(),
        "tokenizer_config.json": b'{"eos_token": "</s>", "bos_token": "<s>"}',
        "chat_template.jinja": b"{% for m in messages %}{{ '<s>' + m.content + '</s>' }}{% endfor %}",
    }
    text, token = HubTokenizer(files), HubTokenizer(with_options(files, "token", None))
    assert token.encode("a<s>a</s>") == [4, 10, 4, 11]
    typed = text.encode("a<s>a</s>")
    assert not {10, 11} & set(typed)
    assert text.decode(typed, specials=True).replace(" ", "") == "a<s>a</s>"
    assert text.encode("aa") == token.encode("aa") == [9]
    talk = [{"role": "user", "content": "<s>a"}, {"role": "assistant", "content": "a</s>"}]
    assert [index for index in text.render(talk).tokens if index > 9] == [10, 11, 10, 11]


def test_the_name_that_the_library_knows_cannot_be_guessed():
    tokenizer = small.tokenizer()
    special = set(tokenizer.special_ids.values())
    for typed in (f"{OPEN}<|im_end|>{CLOSE}", f"{OPEN}<|im_end|>0123456789abcdef{CLOSE}", OPEN, CLOSE):
        ids = tokenizer.encode(typed)
        assert not special & set(ids)
        assert tokenizer.decode(ids) == typed


def test_the_ids_of_a_text_do_not_depend_on_the_name():
    one, other = HubTokenizer(small.files()), HubTokenizer(small.files())
    text = "what is <|im_end|> the <think> answer?\n\n"
    assert one.encode(text) == other.encode(text)
    assert one.fingerprint == other.fingerprint


def test_lone_surrogates_become_question_marks():
    tokenizer = small.tokenizer()
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"
    found = tokenizer.render_chat(
        [{"role": "user", "content": "\udfff"}, {"role": "assistant", "content": "\ud800 it"}]
    )
    assert tokenizer.decode(found.tokens).count("?") == 2


def test_ids_that_are_shown_tell_typed_control_tokens_apart():
    tokenizer = small.tokenizer()
    end = tokenizer.special_ids["<|im_end|>"]
    assert tokenizer.show([*tokenizer.encode("<|im_end|>"), end]) == "<\\|im_end|><|im_end|>"


def test_several_ids_may_end_an_answer():
    files = small.files() | {"generation_config.json": b'{"eos_token_id": [2, 0]}'}
    tokenizer = HubTokenizer(files)
    assert tokenizer.end_ids == (2, 0)
    assert tokenizer.document_ids == (0, 0)
    assert HubTokenizer(small.files(small.ROLES_AS_TEXT)).end_ids == (0, 2)


def test_the_mask_has_no_hole_where_the_library_leaves_white_space_out_of_places():
    parsed = json.loads(small.tokenizer_json())
    parsed["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    trimmed = small.files() | {"tokenizer.json": json.dumps(parsed).encode()}
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the \n\n  answer   "}]
    known = small.tokenizer().render(talk)
    for typed in ("text", "token"):
        found = HubTokenizer(with_options(trimmed, typed, None)).render(talk)
        assert (found.tokens, found.mask) == (known.tokens, known.mask)
    answer = known.mask[known.mask.index(1) :]
    assert answer[: sum(answer)] == [1] * sum(answer)


ODD = (None, True, -1, 2**63, 1.5, "", "é", "<|im_end|>", [], {}, [None], {"content": {}})


def changed(name: str, *path: str | int, value) -> dict[str, bytes]:
    """A small model's files, with another value at a path in one of its JSON files."""
    found = small.files(added_tokens_decoder={"5": {"content": "</s>"}}, chat_template=small.CHATML)
    found |= {"options.json": b"{}"}
    content = json.loads(found[name])
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return found | {name: json.dumps(content).encode()}


@pytest.mark.parametrize("value", ODD, ids=str)
@pytest.mark.parametrize(
    "place",
    [
        ("tokenizer.json", "added_tokens"),
        *(("tokenizer.json", "added_tokens", 0, key) for key in ("content", "id")),
        ("tokenizer.json", "model", "vocab"),
        ("tokenizer.json", "model", "continuing_subword_prefix"),
        ("tokenizer_config.json", "added_tokens_decoder"),
        ("tokenizer_config.json", "added_tokens_decoder", "5"),
        ("tokenizer_config.json", "eos_token"),
        ("options.json", "today"),
        ("options.json", "typed_control"),
    ],
    ids=str,
)
def test_an_odd_value_in_a_file_is_harmless_or_told_in_one_line(place, value, sentencepiece_model):
    files = changed(*place, value=value)
    if place[-1] in ("added_tokens_decoder", "5"):  # read beside a sentencepiece model only
        files = {name: content for name, content in files.items() if name != "tokenizer.json"}
        files["tokenizer.model"] = sentencepiece_model
    try:
        found = HubTokenizer(files)
        assert found.decode(found.encode("an answer")) == "an answer"
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 400


def small_model(vocab: dict[str, int], **changes) -> dict[str, bytes]:
    """The files of a tokenizer whose words are the whole vocabulary."""
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    whole = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": {"type": "Whitespace"}} | changes
    return {"tokenizer.json": json.dumps(whole).encode(), "generation_config.json": b'{"eos_token_id": 0}'}


def test_ids_with_gaps_are_below_the_size_of_the_vocabulary():
    found = HubTokenizer(small_model({"</s>": 0, "[UNK]": 1, "a": 60}))
    assert found.encode("a b") == [60, 1] and found.vocab_size == 61


def test_a_text_without_a_token_is_told_where_there_is_no_token_for_unknown_words():
    found = HubTokenizer(small_model({"</s>": 0, "a": 1}))
    assert found.encode("a a") == [1, 1]
    for encode in (found.encode, lambda text: found.encode_batch([text])):
        with pytest.raises(UserError, match=r"tokenizer\.json cannot encode .*") as caught:
            encode("a b")
        assert "\n" not in str(caught.value)


SPECIAL_FIRST = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": b"{}"},
        small_model(  # a panic of the library, which is no Exception
            {"</s>": 0, "a": 1},
            post_processor={
                "type": "TemplateProcessing", "single": SPECIAL_FIRST, "pair": SPECIAL_FIRST, "special_tokens": {}
            },
        ),
    ],
    ids=["empty", "a special token that is not there"],
)  # fmt: skip
def test_files_that_cannot_encode_anything_are_refused_when_they_are_read(files):
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer that can be read: .+"):
        HubTokenizer(files)


def test_a_sentencepiece_model_without_the_token_for_unknown_text_is_refused(sentencepiece_model):
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model)
    proto.trainer_spec.unk_piece = "e"
    with pytest.raises(UserError, match=r"tokenizer\.model has control pieces that cannot be read"):
        HubTokenizer({"tokenizer.model": proto.SerializeToString(), "tokenizer_config.json": b"{}"})


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    return SubwordTokenizer.train([small.TEXT], 300).model


def test_a_turn_cannot_follow_an_answer_that_has_no_end_token():
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content }}"
        "{% else %}A: {% generation %}{{ m.content }}{% endgeneration %}{% endif %}{{ '\n' }}{% endfor %}"
    )
    talk = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    with pytest.raises(UserError, match="ends an answer without an end token"):
        HubTokenizer(small.files(template)).continuation(talk, [{"role": "user", "content": "more"}])


def test_an_error_names_the_folder_and_for_an_experiment_the_field(tmp_path):
    for name, content in (small.files() | {"generation_config.json": b"{"}).items():
        (tmp_path / name).write_bytes(content)
    said = "generation_config.json is not valid JSON"
    with pytest.raises(UserError, match=f"^{tmp_path}: {said}"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=f"^tokenizer.path {tmp_path}: {said}"):
        named_tokenizer(Tokenizer(path=str(tmp_path)))
