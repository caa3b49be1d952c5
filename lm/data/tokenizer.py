"""The tokenizer: lossless sentencepiece BPE with byte fallback and ChatML's special tokens.

Ids 0, 1, 2 are `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`. They are control pieces: no text encodes to
them, not even a text that contains their names. A newline is its own piece and never merges, so the
tokens of a chat header do not depend on the text after it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import sentencepiece

from lm.data.chatml import END_OF_TEXT, SPECIALS, TURN_END, TURN_START, render_chatml
from lm.data.text_tokenizer import LossOn, Message, Rendered, Tools, Variables
from lm.data.tokenizer_json import SPACE, published_files
from lm.experiment import UserError
from lm.stored import write_atomic

FILE_NAME = "tokenizer.model"
WANTED = "a sentencepiece .model file, or a folder with tokenizer.model or a published model's tokenizer.json"
TRAINING_BYTES = 2_000_000
CHUNK = 4_000  # characters; the training text consists of whole chunks, evenly spread
LONGEST_LINE = 1_000  # characters; sentencepiece skips lines longer than 4192 bytes
DAMAGED = "put back a copy of it if it is damaged"
PROBE = " a\n\n    b\t\u00e9\u4f60 "  # round-trips only through a lossless tokenizer
MIN_VOCAB = 262  # 256 bytes, 3 special tokens, unknown, newline, space
UNTRAINABLE = re.compile("[\0\r\u2585]+")  # sentencepiece drops training lines with these; they are encoded as bytes


class SubwordTokenizer:
    """A sentencepiece model with ChatML's special tokens, given as its serialised bytes."""

    has_template = False
    chats = True
    template_words = frozenset[str]()

    def __init__(self, model: bytes, name: str = "tokenizer"):
        self.model = model
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._sp.vocab_size()
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        self.special_ids: dict[str, int] = {piece: self._sp.piece_to_id(piece) for piece in SPECIALS}
        for piece, index in self.special_ids.items():
            if not (self._sp.is_control(index) and self._sp.id_to_piece(index) == piece):
                raise UserError(
                    f"{name}: {piece} is not a control piece of this sentencepiece model: {DAMAGED}, "
                    f"or train it with control symbols {' '.join(SPECIALS)}"
                )
        self._special_names = {index: piece.encode() for piece, index in self.special_ids.items()}
        self.pad_id = self.special_ids[END_OF_TEXT]
        self.eos_id = self.special_ids[TURN_END]
        self.end_ids: tuple[int, ...] = (self.eos_id,)
        self.bos_id: int | None = self.pad_id
        self.document_ids = (self.pad_id, self.pad_id)
        self._bytes = [_piece_bytes(self._sp, index) for index in range(self.vocab_size)]
        self._char_starts = [sum(byte & 0xC0 != 0x80 for byte in piece) for piece in self._bytes]
        self._space_name_ids = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        if self.decode(self.encode(PROBE)) != PROBE:
            raise UserError(
                f"{name}: this sentencepiece model is not lossless: {DAMAGED}, or train it with byte_fallback, "
                "identity normalisation, no dummy prefix and no removal of extra whitespace"
            )

    def __reduce__(self) -> tuple[type[SubwordTokenizer], tuple[bytes]]:
        """Pickles the model's bytes, which another process loads again."""
        return SubwordTokenizer, (self.model,)

    def encode(self, text: str) -> list[int]:
        """Encode ordinary text to token ids, never special tokens; `decode` is its inverse.

        Lone surrogates, which are not valid in UTF-8, become question marks.
        """
        text = _without_surrogates(text)
        return self._encode_with_space_names(text) if SPACE in text else self._sp.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts at once, on two threads."""
        texts = [_without_surrogates(text) for text in texts]
        if any(SPACE in text for text in texts):
            return [self.encode(text) for text in texts]
        return self._sp.encode(texts, num_threads=2)

    def encode_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Encode text to token ids, with each token's offset: the index of the character that has its first byte."""
        ids = self.encode(text)
        begun = accumulate((self._char_starts[i] for i in ids), initial=0)
        starts = [chars - (self._bytes[i][0] & 0xC0 == 0x80) for i, chars in zip(ids, begun, strict=False)]
        return ids, starts

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """Decode ids to text; broken UTF-8 becomes U+FFFD. Special tokens are left out unless `specials`."""
        names = self._special_names if specials else {}
        return b"".join(names.get(int(i)) or self._bytes[int(i)] for i in ids).decode("utf-8", errors="replace")

    def show(self, ids: Iterable[int]) -> str:
        """Decode ids with special tokens spelt out and lookalikes escaped: ordinary `<|` is shown as `<\\|`
        and `|>` as `|\\>`."""
        parts: list[str] = []
        for special, run in itertools.groupby(map(int, ids), key=self._special_names.__contains__):
            text = self.decode(run, specials=special)
            parts.append(text if special else text.replace("<|", "<\\|").replace("|>", "|\\>"))
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
        """Render a conversation in ChatML."""
        return render_chatml(messages, self, generation_prompt, loss_on, learn_end, tools)

    def continuation(
        self,
        messages: Sequence[Message],
        reply: Sequence[Message],
        tools: Tools = None,
        variables: Variables | None = None,
    ) -> list[int]:
        """The ids of the reply, from the end token of the last message to the header of the next answer."""
        return [*self.encode("\n"), *self.render(reply, generation_prompt=True, tools=tools).tokens]

    def save(self, folder: str | Path) -> Path:
        """Write `folder/tokenizer.model` atomically; returns its path."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_atomic(path, self.model)

    def published_files(self, max_len: int) -> dict[str, bytes]:
        """See `TextTokenizer`. Raises UserError for a model of another kind than those trained here."""
        return published_files(self.model, max_len)

    @classmethod
    def load(cls, path: str | Path) -> SubwordTokenizer:
        """Load a sentencepiece `.model` file, or the one in a folder. Raises UserError if there is none."""
        path = Path(path).expanduser()
        file = path / FILE_NAME if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"tokenizer.path: there is no file {file}; name {WANTED}")
        model = file.read_bytes()
        try:
            if model:  # otherwise sentencepiece fails only when it is first used
                return cls(model, name=str(file))
        except (RuntimeError, IndexError, ValueError, OverflowError) as error:
            raise UserError(
                f"tokenizer.path: {file} is not a sentencepiece model: {DAMAGED}, or name {WANTED}"
            ) from error
        raise UserError(f"tokenizer.path: {file} is empty: {DAMAGED}, or name {WANTED}")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, folder: str | Path | None = None) -> SubwordTokenizer:
        """Train at most `vocab_size` pieces on about 2 MB of the texts; the same texts give the same model.

        There are fewer pieces if the texts have no more pairs to merge. Saves the model into `folder` if given. Raises
        UserError for a vocabulary too small for the bytes and special tokens, and if every text is empty.
        """
        if vocab_size < MIN_VOCAB:
            raise UserError(f"tokenizer.vocab_size is {vocab_size}; it must be at least {MIN_VOCAB}")
        sample = _sample(list(texts), TRAINING_BYTES)
        if not any(sample):
            raise UserError("the tokenizer has no text to train on: every training text is empty")
        tokenizer = cls._most_pieces(list(_lines(sample)), vocab_size)
        if folder is not None:
            tokenizer.save(folder)
        return tokenizer

    @classmethod
    def _most_pieces(cls, lines: list[str], vocab_size: int) -> SubwordTokenizer:
        """Train with up to half of the pieces (beyond the bytes) for single letters, more if longer pieces run out."""
        letters, most, before = len(set().union(*lines)), (vocab_size - MIN_VOCAB + 1) // 2, 0
        while True:
            tokenizer = cls(_train(_common_letters(lines, most), vocab_size))
            unused = vocab_size - tokenizer.vocab_size
            if most >= letters or unused == 0 or tokenizer.vocab_size == before:
                return tokenizer
            most, before = most + unused, tokenizer.vocab_size

    def _encode_with_space_names(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(text.split(SPACE)):
            ids += (self._space_name_ids if index else []) + self._sp.encode(part)
        return ids


def _train(lines: list[str], vocab_size: int) -> bytes:
    """Train a serialised sentencepiece model of at most `vocab_size` pieces, which include the space and every byte."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # The trailing space: sentencepiece refuses to train on a text without letters.
        sentence_iterator=iter([*lines, " "]),
        model_writer=model,
        model_type="bpe",
        vocab_size=min(vocab_size, TRAINING_BYTES),  # a text cannot have more pieces than bytes
        hard_vocab_limit=False,
        required_chars=SPACE,
        character_coverage=0.9999,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n"],
        pad_id=0,
        pad_piece=END_OF_TEXT,
        bos_id=1,
        bos_piece=TURN_START,
        eos_id=2,
        eos_piece=TURN_END,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _common_letters(lines: list[str], most: int) -> list[str]:
    """Split the lines at all but the `most` most frequent characters; rare ones are left to the byte pieces."""
    counts = Counter[str]()
    for line in lines:
        counts.update(line)
    rare = "".join(letter for letter, _ in counts.most_common()[most:])
    if not rare:
        return lines
    cut = re.compile(f"[{re.escape(rare)}]+")
    return [piece for line in lines for piece in cut.split(line) if piece]


def _sample(texts: list[str], limit: int) -> list[str]:
    """Sample the texts: all of them, or evenly spread chunks of `limit` UTF-8 bytes in all."""
    sizes = [len(text.encode(errors="replace")) for text in texts]
    if sum(sizes) <= limit:
        return texts
    chunks = [text[at : at + CHUNK] for text in texts for at in range(0, len(text), CHUNK)]
    keep = max(1, len(chunks) * limit // sum(sizes))
    return [chunks[index * len(chunks) // keep] for index in range(keep)]


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Split texts into lines that sentencepiece can train on: without newlines, not too long."""
    for text in texts:
        for line in UNTRAINABLE.sub("\n", _without_surrogates(text).replace(SPACE, " ")).split("\n"):
            for at in range(0, len(line), LONGEST_LINE):  # none for an empty line
                yield line[at : at + LONGEST_LINE]


def _piece_bytes(sp: sentencepiece.SentencePieceProcessor, index: int) -> bytes:
    if sp.is_control(index) or sp.is_unknown(index):
        return b""
    piece = sp.id_to_piece(index)
    return bytes([int(piece[3:5], 16)]) if sp.is_byte(index) else piece.replace(SPACE, " ").encode()


@functools.lru_cache(maxsize=1)
def _surrogates() -> re.Pattern[str]:
    return re.compile("[\ud800-\udfff]")


def _without_surrogates(text: str) -> str:
    return _surrogates().sub("?", text)
