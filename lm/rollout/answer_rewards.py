"""Rewards by simple rules: exact text, multiple choice, patterns, JSON schemas, format, language, length.

Each takes (row, completion), and most a parameter, the text after `:` in the verifier's name.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lm.config.field import UserError
from lm.rollout.answer_match import expected_reading, marked_answers, plain, readings

Rule = Callable[[Mapping[str, Any], str], float]

TAGS = ("think", "answer")  # the format of DeepSeek-R1 (arXiv:2501.12948, section 2.2)
LETTER = re.compile(r"\(?([A-Z])\)?[).:]?")
LONE_LETTER = re.compile(r"(?<![A-Za-z'])[A-Z](?![A-Za-z'])")
FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
LINE_LETTERS = 24  # letters of a text whose language is identified; shorter lines are joined with the next
# Languages that can be told apart: identification among more is wrong more often for short texts.
LANGUAGES = tuple("ar bg bn ca cs da de el en es et fa fi fr he hi hr hu id it ja ko lt lv ms nl no pl pt ro ru sk sl sr sv ta th tr uk ur vi zh".split())  # fmt: skip


def exact(expected: str, completion: str) -> float:
    """1 if the completion is the expected answer, ignoring white space around it."""
    return float(completion.strip() == expected.strip() != "")


def choice(row: Mapping[str, Any], expected: str, completion: str) -> float:
    """1 if the completion chooses the expected letter (A to Z); the row may list the `choices` and name the right one by its text.

    The choice is the marked answer (`answer is B`, `\\boxed{B}` …), else the only letter that stands alone.
    """
    names, wanted = _letters(row), chosen_letter(row, expected)
    marked = [found for answer in marked_answers(plain(completion))[:1] for found in readings(answer)]
    letters = {_chosen(found, names) for found in marked} - {""}
    if not marked:
        whole = _chosen(completion.strip(), names)
        letters = {whole} if whole else set(LONE_LETTER.findall(plain(completion)))
    return float(wanted != "" and letters == {wanted})


def chosen_letter(row: Mapping[str, Any], expected: str) -> str:
    """The letter of the expected answer; empty if it is no choice."""
    return _chosen(expected_reading(expected), _letters(row))


def _letters(row: Mapping[str, Any]) -> dict[str, str]:
    """The letter of each of the row's choices."""
    listed = row.get("choices") or row.get("options")
    texts = [str(one).strip() for one in listed] if isinstance(listed, list | tuple) else []
    return {text: chr(ord("A") + place) for place, text in enumerate(texts[:26])}


def _chosen(text: str, names: Mapping[str, str]) -> str:
    """The letter of a choice, given as letter or text; empty if it is neither."""
    if text in names:
        return names[text]
    found = LETTER.fullmatch(text) or re.match(r"\(?([A-Z])[).:]\s", text)
    return found[1] if found else ""


def regex(pattern: str) -> Rule:
    """The verifier `regex:PATTERN`: 1 if the pattern is found in the completion."""
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"regex:{pattern} is no regular expression: {error}") from None
    return lambda row, completion: float(compiled.search(completion) is not None)


def json_schema(file: str) -> Rule:
    """The verifier `json_schema:FILE`: 1 if the completion is JSON that a JSON schema allows; without FILE the column `schema` has it."""
    validate = _validator(_text_of(file), file) if file else None

    def score(row: Mapping[str, Any], completion: str) -> float:
        allows = validate or check_schema(row)
        blocks = FENCE.findall(completion)
        try:
            text = blocks[-1] if blocks else completion.rpartition("</think>")[2]
            return float(allows(json.loads(text, parse_constant=_refuse)))
        except (ValueError, RecursionError):
            return 0.0

    return score


def check_schema(row: Mapping[str, Any]) -> Callable[[Any], bool]:
    """The test of a value by the JSON schema in the row's column `schema`. Raises UserError if it is no schema."""
    return _validator(_as_json(row["schema"]), "the column schema")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _text_of(file: str) -> str:
    if not os.path.isfile(file):  # False for a name that is too long, where a Path raises
        raise UserError(f"json_schema:{file}: there is no such file")
    try:
        return Path(file).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"json_schema:{file} cannot be read: {error}") from None


def _as_json(schema: Any) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)


@functools.lru_cache(maxsize=4096)
def _validator(schema: str, where: str) -> Callable[[Any], bool]:
    from jsonschema import SchemaError, validators
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    try:
        parsed = json.loads(schema)
        if not isinstance(parsed, dict | bool) or (
            isinstance(parsed, dict) and not isinstance(parsed.get("$schema", ""), str)
        ):
            raise ValueError("it should be an object, its $schema a text")
        kind = validators.validator_for(parsed)
        kind.check_schema(parsed)
    except (ValueError, RecursionError, SchemaError) as error:
        raise UserError(f"json_schema: {where} is no JSON schema: {str(error).splitlines()[0]}") from None
    validator = kind(parsed, registry=Registry())  # an empty registry: nothing is fetched
    root = Registry().resolver_with_root(DRAFT202012.create_resource(parsed))
    own_names = any(
        _texts_under("$id", parsed)
    )  # to which references may be relative; these are told when they are met
    for reference in () if own_names else _texts_under("$ref", parsed):
        try:
            root.lookup(reference)
        except Unresolvable:
            raise UserError(f"json_schema: {where} refers to what it does not hold: {reference}") from None

    def allows(value: Any) -> bool:
        try:
            return bool(validator.is_valid(value))
        except Unresolvable as error:
            raise UserError(f"json_schema: {where} refers to what it does not hold: {error.ref}") from None

    return allows


def _texts_under(key: str, value: Any) -> Iterator[str]:
    """The texts that a JSON value has under a key, at any depth."""
    for name, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if name == key and isinstance(item, str):
            yield item
        yield from _texts_under(key, item)


def tag_format(tags: str) -> Rule:
    """The verifier `format:TAG,TAG`: 1 if the completion is these XML tags in order, once each, and nothing else."""
    names = [tag.strip() for tag in tags.split(",")] if tags else list(TAGS)
    if not all(re.fullmatch(r"[A-Za-z][\w-]*", name) for name in names):
        raise UserError(f"format:{tags}: it should be names of tags, for instance format:{','.join(TAGS)}")

    def score(row: Mapping[str, Any], completion: str) -> float:
        rest = completion
        for name in names:
            before, opened, rest = rest.partition(f"<{name}>")
            content, closed, rest = rest.partition(f"</{name}>")
            if before.strip() or not opened or not closed or any(f"<{other}>" in content for other in names):
                return 0.0
        return float(not rest.strip())

    return score


def language(code: str) -> Rule:
    """The verifier `language:CODE`: the share of a completion's letters that are in lines of that language (ISO 639-1), by py3langid."""
    if code not in LANGUAGES:
        raise UserError(f"language:{code}: it should be one of {', '.join(LANGUAGES)}, for instance language:en")
    _identifier()  # its model is read here, not within the time limit of the first reward

    def score(row: Mapping[str, Any], completion: str) -> float:
        pieces = _pieces(completion)
        letters = [sum(map(str.isalpha, piece)) for piece in pieces]
        right = [count for count, piece in zip(letters, pieces, strict=True) if _identified(piece) == code]
        return sum(right) / sum(letters) if sum(letters) else 0.0

    return score


def _pieces(text: str) -> list[str]:
    """The lines of a text, short ones joined, so that each has enough letters to tell its language."""
    pieces = [""]
    for line in text.splitlines():
        long_enough = sum(map(str.isalpha, pieces[-1])) >= LINE_LETTERS
        pieces = [*pieces, line] if long_enough else [*pieces[:-1], f"{pieces[-1]} {line}".strip()]
    if len(pieces) > 1 and sum(map(str.isalpha, pieces[-1])) < LINE_LETTERS:
        pieces[-2:] = [" ".join(pieces[-2:])]
    return pieces


def _identified(text: str) -> str:
    return str(_identifier().classify(text)[0])


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(list(LANGUAGES))
    return identifier


def overlong(bounds: str) -> Rule:
    """The verifier `overlong:LOW-HIGH`: 0 up to LOW sampled tokens, falling to -1 at HIGH (DAPO, arXiv:2503.14476, eq. 13).

    HIGH is usually max_new_tokens, and HIGH - LOW DAPO's L_cache.
    """
    found = re.fullmatch(r"(\d{1,9})-(\d{1,9})", bounds)
    low, high = map(int, found.groups()) if found else (0, 0)
    if not low < high:
        raise UserError(
            f"overlong:{bounds}: it should be two numbers of tokens, for instance overlong:384-512: 0 up to 384, -1 from 512"
        )

    def score(row: Mapping[str, Any], completion: str) -> float:
        return max(-1.0, min(0.0, (low - int(row[TOKENS])) / (high - low)))

    return score


TOKENS = "completion_tokens"  # in the row that a verifier gets: number of tokens that the model sampled
