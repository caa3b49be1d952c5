"""The protocol of tokenizers: those trained here, and those of published models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

Message = Mapping[str, Any]  # role, content, and `train`: False where a flag takes the turn out of the loss
LossOn = Literal["answers", "all"]
Tools = Sequence[Any] | None  # definitions of the tools that the assistant may call
Variables = Mapping[str, Any]  # of a chat template


# Parts of a conversation that a chat template may leave out, by number, as the cache stores them. Append new ones at the end.
LEFT_OUT = (
    "system messages",
    "user messages",
    "assistant messages",
    "tool messages",
    "messages of other roles",
    "reasoning",
    "tool calls",
    "parts of texts",
    "generation blocks around assistant messages",
    "tool definitions",
    "the structure of tool arguments, which are JSON text in the row and quoted in its output",
)


class Rendered(NamedTuple):
    """Token ids, loss mask (1 for each token that the loss covers), and the index at which the last turn begins.

    `straddling` counts tokens with characters both of an answer and of other text; `left_out` names the parts that the
    template leaves out.
    """

    tokens: list[int]
    mask: list[int]
    last_turn: int = 0
    straddling: int = 0
    left_out: tuple[str, ...] = ()


class TextTokenizer(Protocol):
    """Text to ids and back, and conversations to ids and loss mask.

    Attributes:
        fingerprint: SHA-256 of everything that determines ids and masks.
        special_ids: the ids of special tokens by name.
        pad_id: the id of padding.
        eos_id, end_ids: the main id that ends an answer, and all ids that do.
        bos_id: the token that the published files declare as the first one; None if they declare none.
        document_ids: the ids before and after a document.
        has_template: whether conversations are rendered by a model's chat template, which may leave parts out.
        chats: whether conversations can be rendered; false for a published model without a chat template.
        template_words: the words in the chat template; a turn's key that is not among them has no effect.
    """

    vocab_size: int
    fingerprint: str
    special_ids: dict[str, int]
    pad_id: int
    eos_id: int
    end_ids: tuple[int, ...]
    bos_id: int | None
    document_ids: tuple[int, int]
    has_template: bool
    chats: bool
    template_words: frozenset[str]

    def encode(self, text: str) -> list[int]:
        """Ids of a text; control tokens that it spells are text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts."""
        ...

    def encode_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a text, and for each id the index of the character that has its first byte."""
        ...

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """The text of ids, without special tokens unless `specials`."""
        ...

    def show(self, ids: Iterable[int]) -> str:
        """The text of ids with special tokens spelt out, and text that looks like one escaped."""
        ...

    def render(
        self,
        messages: Sequence[Message],
        generation_prompt: bool = False,
        loss_on: LossOn = "answers",
        learn_end: bool = True,
        tools: Tools = None,
        variables: Variables | None = None,
    ) -> Rendered:
        """Ids and loss mask of a conversation; with `generation_prompt` it ends with the header of the next answer.

        Args:
            variables: of the chat template, in addition to the model's own; without a template they have no effect.
        """
        ...

    def continuation(
        self,
        messages: Sequence[Message],
        reply: Sequence[Message],
        tools: Tools = None,
        variables: Variables | None = None,
    ) -> list[int]:
        """The ids of the reply, from the end token of the last message to the header of the next answer."""
        ...

    def save(self, folder: str | Path) -> Path:
        """Write the tokenizer's files into a folder."""
        ...

    def published_files(self, max_len: int) -> dict[str, bytes]:
        """The tokenizer's files for transformers, by name; `generation_config.json` has all of `end_ids`."""
        ...
