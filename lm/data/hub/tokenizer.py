"""The tokenizer of a published model: its vocabulary, its special tokens and its chat template, from a folder."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lm.data.hub import files as hub_files
from lm.data.hub.files import AddedToken
from lm.data.hub.marks import Shields, all_text, free_letters
from lm.data.hub.sandbox import BLOCK_MARKS
from lm.data.hub.template import ChatTemplate, TemplateError, Turn
from lm.data.hub.turns import Conversation, Reader, Span, without_blocks
from lm.data.hub.vocabulary import (
    Encoded,
    JsonVocabulary,
    Segment,
    SentencepieceVocabulary,
    Vocabulary,
    control_pieces,
    split_at,
)
from lm.data.text_tokenizer import LossOn, Message, Rendered, Tools, Variables
from lm.experiment import UserError

TypedControl = Literal["text", "token"]
WHERE = "tokenizer.path"
WORD = re.compile(r"\w+")
DOCUMENT_END = "<|endoftext|>"  # separates documents in models that have it, even if another token ends answers


class RenderedChat(NamedTuple):
    """A conversation's tokens and loss mask, with counts for the log."""

    tokens: list[int]
    mask: list[int]
    text: str
    spans: tuple[Span, ...]
    straddling: int  # number of tokens with characters both of the assistant's text and of other text
    left_out: tuple[str, ...]  # parts that the template leaves out, named as in `LEFT_OUT`
    last_start: int  # index of the first token of the assistant's last turn; without one, the number of tokens


@dataclass(frozen=True)
class ShieldedChat:
    """A conversation with shields, the template's output for it, and private characters that are still unused."""

    messages: list[dict[str, Any]]
    tools: Any
    variables: Mapping[str, Any]
    output: str  # generation blocks between marks
    shields: Shields
    letters: Iterator[str]


class HubTokenizer:
    """A published model's tokenizer, given as its files' bytes; `options.json` among them has the user's options.

    Args:
        vocabulary: that of the same files, if it has been read before.
    """

    has_template = True

    def __init__(self, files: Mapping[str, bytes], where: str = WHERE, vocabulary: Vocabulary | None = None):
        self.files, self._where = dict(files), where
        self.fingerprint: str = _fingerprint(self.files)
        options = hub_files.read_json(self.files, hub_files.OPTIONS, where)
        self._typed_is_text = options.get("typed_control", "text") == "text"
        now = hub_files.read_date(options, where)
        names = hub_files.special_token_names(self.files, where)
        self._templates = {
            name: ChatTemplate(source, names, now, f"{where}: chat template")
            for name, source in hub_files.template_sources(self.files, where).items()
        }
        self.chats = bool(self._templates)
        parsed, added = self._read_added()
        written = "\n".join(one.source for one in self._templates.values())
        self.template_words = frozenset(WORD.findall(written))
        # Tokens that the template writes are control tokens too, although files may not mark them as special (<tool_call>).
        self._control = {
            name: one for name, one in added.items() if one.is_control or (name.strip() and name in written)
        }
        self._first_letters = {name[0] for name in (*self._control, *BLOCK_MARKS)}
        self._assistants_own = {name: one for name, one in self._control.items() if not one.is_control}
        self._added = added
        self._vocabulary = vocabulary or self._read_vocabulary(parsed)
        self.vocab_size: int = self._vocabulary.vocab_size
        self.control_names, self.added_names = frozenset(self._control), frozenset(added)
        self.special_ids: dict[str, int] = {name: one.id for name, one in added.items() if one.special}
        self._special_names = {index: name for name, index in self.special_ids.items()}
        self.bos_id, self.unk_id = (self._id_of(names.get(role)) for role in ("bos_token", "unk_token"))
        self.end_ids = self._read_ends(names)
        self.eos_id = self.end_ids[0]
        pad = self._id_of(names.get("pad_token"))
        self.pad_id = self.eos_id if pad is None else pad
        first, last = (self._id_of(DOCUMENT_END), self._id_of(DOCUMENT_END))
        if last is None:
            first, last = self.bos_id, self._id_of(names.get("eos_token"))
        self.document_ids = (self.pad_id if first is None else first, self.pad_id if last is None else last)

    def _read_added(self) -> tuple[dict[str, Any], dict[str, AddedToken]]:
        """The parsed `tokenizer.json`, empty for a sentencepiece model, and the added tokens."""
        parsed = hub_files.read_json(self.files, hub_files.TOKENIZER_JSON, self._where)
        if hub_files.TOKENIZER_JSON in self.files:
            return parsed, hub_files.added_tokens(parsed.get("added_tokens") or [], self._where)
        added = hub_files.added_tokens(hub_files.added_beside(self.files, self._where), self._where)
        return parsed, control_pieces(self.files[hub_files.SENTENCEPIECE], self._where) | added

    def _read_vocabulary(self, parsed: dict[str, Any]) -> Vocabulary:
        if hub_files.TOKENIZER_JSON in self.files:
            apart = self._control if self._typed_is_text else {}
            return JsonVocabulary(parsed, self.files[hub_files.TOKENIZER_JSON], apart, self._where)
        settings = hub_files.read_json(self.files, hub_files.CONFIG, self._where)
        once = settings.get("legacy", True) is False
        return SentencepieceVocabulary(self.files[hub_files.SENTENCEPIECE], self._added, once, self._where)

    def _id_of(self, name: str | None) -> int | None:
        return self._added[name].id if name in self._added else None

    def _read_ends(self, names: Mapping[str, str]) -> tuple[int, ...]:
        """The ids that end an answer: from the template, the generation settings and the special tokens."""
        written = sorted(self._reader("default").end_tokens()) if self._templates else []
        ids = [
            *map(self._id_of, written),
            *hub_files.end_ids(self.files, self._where),
            self._id_of(names.get("eos_token")),
        ]
        found = tuple(dict.fromkeys(index for index in ids if index is not None))
        if not found:
            raise UserError(
                f"{self._where}: the files define no token that ends a text (eos_token in {hub_files.CONFIG})"
            )
        if max(found) >= self.vocab_size:
            raise UserError(f"{self._where}: the end token {max(found)} is not among the {self.vocab_size} tokens")
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the files' bytes, which the other process parses again."""
        return HubTokenizer, (self.files, self._where)

    @functools.cached_property
    def _readers(self) -> dict[str, Reader]:
        return {name: Reader(template, self.added_names) for name, template in self._templates.items()}

    def _reader(self, name: str) -> Reader:
        if not self.chats:
            raise UserError(
                f"{self._where} has no chat template, which conversations need: put one in Jinja into the folder as "
                f"{hub_files.TEMPLATE}, name one with --tokenizer.chat_template FILE, or train on texts"
            )
        return self._readers[name if name in self._readers else "default"]

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """Encode text to ids; control tokens that it spells are text, unless `typed_control` is token.

        Args:
            special_tokens: add the special tokens around the text that the model's files define.
        """
        return self._vocabulary.encode(self._segments(text), special_tokens).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts at once."""
        if any(len(self._segments(text)) > 1 for text in texts):
            return [self.encode(text) for text in texts]
        return self._vocabulary.encode_texts([without_surrogates(text) for text in texts])

    def encode_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Encode text to token ids, with each token's offset: the index of the character that has its first byte."""
        found = self._vocabulary.encode(self._segments(text))
        return found.ids, found.starts

    def _segments(self, text: str) -> list[Segment]:
        """The segments of a plain text; tokens that an assistant writes, such as <tool_call>, become tokens."""
        matched = self._assistants_own if self._typed_is_text else {}
        return [matched[piece] if found else piece for piece, found in split_at(without_surrogates(text), matched)]

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """Decode ids to text; broken UTF-8 becomes U+FFFD. Special tokens are left out unless `specials`."""
        kept = [index for index in map(int, ids) if specials or index not in self._special_names]
        return self._vocabulary.decode(kept)

    def show(self, ids: Iterable[int]) -> str:
        """Decode ids with special tokens spelt out, and a backslash in text that only looks like one."""
        parts: list[str] = []
        for special, run in itertools.groupby(map(int, ids), key=self._special_names.__contains__):
            text = self.decode(run, specials=True)
            pieces = split_at(text, () if special else self.special_ids)
            parts += [f"{piece[:1]}\\{piece[1:]}" if is_name else piece for piece, is_name in pieces]
        return "".join(parts)

    def render(
        self,
        messages: Sequence[Message],
        generation_prompt: bool = False,
        loss_on: LossOn = "answers",
        learn_end: bool = True,
        tools: Tools = None,
        variables: Variables | None = None,
    ) -> Rendered:
        """See `TextTokenizer`; `render_chat` returns more details."""
        found = self.render_chat(messages, tools, generation_prompt, loss_on, learn_end, variables)
        return Rendered(found.tokens, found.mask, found.last_start, found.straddling, found.left_out)

    def continuation(
        self,
        messages: Sequence[Message],
        reply: Sequence[Message],
        tools: Tools = None,
        variables: Variables | None = None,
    ) -> list[int]:
        """See `TextTokenizer`. Raises TemplateError if the reply changes the rendering of earlier messages."""
        reader, given = self._reader("tool_use" if tools else "default"), _bare([*messages, *reply])
        talk, shields = self._read(reader, given, tools, variables or {}, False)
        asked, again = self._read(reader, given, tools, variables or {}, True)
        spans = [one for one in talk.spans if one.turn < len(messages)]
        end = spans[-1].end if spans else 0
        if shields != again or talk.text[:end] != asked.text[:end]:
            raise TemplateError(
                f"{reader.template.where}: the template renders a turn differently when another one follows"
            )
        # Encoded after the end token, not alone: the first tokens of a text, and white space, may be encoded differently.
        before = self._control.get(talk.text[spans[-1].text_end : end].strip()) if spans else None
        if spans and before is None:
            raise TemplateError(f"{reader.template.where}: the template ends an answer without an end token")
        segments = self._rendered(asked.text[end:], shields)
        return self._vocabulary.encode([before, *segments] if before else segments).ids[bool(before) :]

    def render_chat(
        self,
        messages: Sequence[Turn],
        tools: Sequence[Any] | None = None,
        generation_prompt: bool = False,
        loss_on: LossOn = "answers",
        learn_end: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> RenderedChat:
        """Render a conversation by the model's chat template, to ids and loss mask.

        The mask covers the assistant's text and its end tokens (`loss_on` all: everything), but no end tokens without
        `learn_end`, and no message with `train` False. A token that contains any of the assistant's text is covered.

        Raises:
            TemplateError: the template refuses the conversation, or the assistant's text cannot be located in its output.
            UserError: there is no template.
        """
        reader = self._reader("tool_use" if tools else "default")
        talk, shields = self._read(reader, _bare(messages), tools, variables or {}, generation_prompt)
        encoded = self._vocabulary.encode(self._rendered(talk.text, shields))
        spans, text = talk.spans, shields.remove(talk.text)
        if shields.names:
            sizes = [len(shields.names.get(letter, letter)) for letter in talk.text]
            at = list(accumulate(sizes, initial=0))
            spans = tuple(Span(at[one.start], at[one.text_end], at[one.end], one.turn) for one in spans)
        mask, straddling = _mask(encoded, len(text), spans, messages, loss_on, learn_end)
        last = spans[-1].start if spans else 0
        first = next((i for i, end in enumerate(encoded.ends) if end > last), 0) if spans else len(encoded.ids)
        return RenderedChat(encoded.ids, mask, text, spans, straddling, talk.left_out, first)

    def _read(
        self, reader: Reader, messages: list[dict[str, Any]], tools: Any, variables: Mapping[str, Any], prompt: bool
    ) -> tuple[Conversation, Shields]:
        """The rendered conversation with shields in place of typed control tokens, and the shields."""
        one = self._shielded(reader, messages, tools, variables, prompt)
        if prompt:
            text = without_blocks(one.output)[0]
            left_out = reader.left_out(one.messages, one.tools, one.variables, one.letters, text)
            return Conversation(text, (), left_out), one.shields
        return reader.read(one.messages, one.tools, one.variables, one.letters, one.output), one.shields

    def _shielded(
        self, reader: Reader, messages: list[dict[str, Any]], tools: Any, variables: Mapping[str, Any], prompt: bool
    ) -> ShieldedChat:
        """The conversation with shields for all typed control tokens, or for those that the template does not look for."""
        typed = all_text([messages, tools, dict(variables)])
        letters = free_letters(typed)
        possible = () if self._first_letters.isdisjoint(typed) else (*self._control, *BLOCK_MARKS)
        shields = Shields.of([name for name in possible if name in typed], letters)
        narrow = shields.only(shields.letters.keys() - self._assistants_own.keys())
        plain = reader.template.render(messages, tools, prompt, variables)
        for wide in (shields, narrow):
            given = [_put_shields(turn, narrow if turn.get("role") == "assistant" else wide) for turn in messages]
            offered, named = wide.put(tools), wide.put(dict(variables))
            text = (
                plain
                if (given, offered, named) == (messages, tools, variables)
                else reader.template.render(given, offered, prompt, named)
            )
            if shields.remove(text) == plain:
                return ShieldedChat(given, offered, named, text, shields, letters)
        raise TemplateError(
            f"{reader.template.where}: the template depends on control tokens that a message spells out; "
            "tokenizer.typed_control token accepts them as control tokens"
        )

    def _rendered(self, text: str, shields: Shields) -> list[Segment]:
        """The segments (text and control tokens) of a template's output."""
        segments: list[Segment] = []
        names = self.control_names.union(shields.names) if shields.names else self.control_names
        for piece, is_token in split_at(text, names):
            if is_token and piece in self._control:
                segments.append(self._control[piece])
            elif is_token and not self._typed_is_text:
                segments.append(self._control.get(shields.names[piece], shields.names[piece]))
            else:
                said = without_surrogates(shields.names.get(piece, piece))
                if segments and isinstance(segments[-1], str):
                    segments[-1] += said
                else:
                    segments.append(said)
        return segments

    def save(self, folder: str | Path) -> Path:
        """Write the unchanged files into `folder`, and return it."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        # Written last: its presence shows that all files are complete.
        for name, content in sorted(self.files.items(), key=lambda file: file[0] in hub_files.VOCABULARIES):
            draft = path / f"{name}.{os.getpid()}.tmp"
            draft.write_bytes(content)
            os.replace(draft, path / name)
        return path

    def published_files(self, max_len: int) -> dict[str, bytes]:
        """The unchanged files, except that `generation_config.json` gets the ids of `end_ids` that it lacks."""
        found = {name: content for name, content in self.files.items() if name != hub_files.OPTIONS}
        known = hub_files.end_ids(found, self._where)
        if more := [index for index in self.end_ids if index not in known]:
            generation = hub_files.read_json(found, hub_files.GENERATION, self._where)
            found[hub_files.GENERATION] = json.dumps(generation | {"eos_token_id": [*more, *known]}, indent=2).encode()
        return found

    @classmethod
    def load(
        cls,
        folder: str | Path,
        typed_control: TypedControl | None = None,
        template: str | None = None,
        where: str = WHERE,
    ) -> HubTokenizer:
        """Read a model's folder. Raises UserError if its tokenizer is missing or cannot be read.

        Args:
            typed_control, template: see `with_options`.
        """
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise UserError(f"{where}: there is no folder {path}")
        return cls(with_options(hub_files.read_files(path, where), typed_control, template, where), where)


def with_options(
    files: Mapping[str, bytes], typed_control: TypedControl | None, template: str | None, where: str = WHERE
) -> dict[str, bytes]:
    """The files, with the user's options added as `options.json`.

    Args:
        typed_control: how a control token in a message's text is encoded: as its text (the default), or, as in the
            models' own libraries, as the control token.
        template: a chat template to use instead of the model's own.
    """
    found = dict(files) | ({} if template is None else {hub_files.TEMPLATE: template.encode()})
    options = hub_files.read_json(found, hub_files.OPTIONS, where)
    if typed_control is not None:
        options |= {"typed_control": typed_control}
    options = {name: value for name, value in options.items() if value != "text"}
    if any("strftime_now" in source for source in hub_files.template_sources(found, where).values()):
        options.setdefault("today", date.today().isoformat())  # the same date until the end of the run
    return found | ({hub_files.OPTIONS: json.dumps(options, sort_keys=True).encode()} if options else {})


def _mask(
    encoded: Encoded, size: int, spans: Sequence[Span], messages: Sequence[Turn], loss_on: str, learn_end: bool
) -> tuple[list[int], int]:
    """The loss mask, and the number of tokens that contain both the assistant's text and other text."""
    wrote, learnt = np.zeros(size, np.int64), np.full(size, int(loss_on == "all"))
    for one in spans:
        wrote[one.start : one.end] = 1
        learnt[one.start : one.end] = messages[one.turn].get("train", True) is not False
        if not learn_end:
            learnt[one.text_end : one.end] = 0
    starts = np.array(encoded.starts, np.int64)
    ends = np.maximum(np.array(encoded.ends, np.int64), starts)
    inside, covered = (np.concatenate([[0], np.cumsum(values)]) for values in (wrote, learnt))
    parts = inside[ends] - inside[starts]
    return (covered[ends] > covered[starts]).astype(int).tolist(), int(((parts > 0) & (parts < ends - starts)).sum())


def _bare(messages: Sequence[Turn]) -> list[dict[str, Any]]:
    """The messages without the keys that only training and trajectories use."""
    return [{key: value for key, value in turn.items() if key not in ("train", "author")} for turn in messages]


def _put_shields(turn: Turn, shields: Shields) -> dict[str, Any]:
    """The message with shields in its texts; its role stays."""
    return {key: value if key == "role" else shields.put(value) for key, value in turn.items()}


def _fingerprint(files: Mapping[str, bytes]) -> str:
    """SHA-256 of everything that determines ids and masks."""
    parts = [f"{name} {hashlib.sha256(content).hexdigest()}" for name, content in sorted(files.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def without_surrogates(text: str) -> str:
    """The text with a question mark for each lone surrogate, which is not valid in UTF-8."""
    return text.encode(errors="replace").decode()
