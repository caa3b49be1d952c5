"""Held-out measurements, one function a metric: bits per byte here, the others from their files."""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable

from lm.data.chat import render, training_messages
from lm.data.pipeline import heldout_rows, heldout_texts
from lm.data.tokenizer import Tokenizer
from lm.evals.answers import best_of_n, pass_at_k, reward
from lm.evals.pairs import pair_accuracy
from lm.evals.rows import Measured, Row, Subject, row_logp
from lm.experiment import Eval, UserError
from lm.model.transformer import Transformer


def measure(item: Eval, subject: Subject) -> Measured:
    """What `item` asks for, of this model."""
    return METRICS[item.metric](item, subject)


def windows(ids: list[int], width: int) -> list[Row]:
    """Rows of at most `width` tokens in which every token but the first is predicted exactly once."""
    return [(ids[i : i + width], [0] + [1] * (len(ids[i : i + width]) - 1)) for i in range(0, len(ids) - 1, width - 1)]


def bits_per_byte(item: Eval, subject: Subject) -> Measured:
    """Bits that the model needs for each byte of held-out text: of documents, or of the answers in conversations.

    Documents begin and end with the end-of-text token; the ends' bits count, their bytes do not. A document that
    is longer than the context is cut into windows, which start without memory. For them there is what `xz -9e` needs.
    Of a conversation the assistant's turns and their ends are predicted, given all before; one that does not fit in
    the context is left out, and not counted.
    """
    model, tokenizer = subject.model, subject.tokenizer
    assert isinstance(model, Transformer)
    width = model.config.max_len
    documents = "text" in heldout_rows(item.source, 1)[0]
    rows, texts = (_documents if documents else _answers)(item, tokenizer, width)
    nats, size = -float(row_logp(model, rows, width).sum()), sum(map(len, texts))
    predicted = sum(sum(mask) for _, mask in rows)
    values = {"bits_per_byte": nats / math.log(2) / size, "loss": nats / predicted, "bytes": float(size)}
    if documents:
        packed = len(lzma.compress(b"\n\n".join(texts), preset=9 | lzma.PRESET_EXTREME))
        values["xz_bits_per_byte"] = 8 * packed / size
    return Measured(values, len(rows))


def _documents(item: Eval, tokenizer: Tokenizer, width: int) -> tuple[list[Row], list[bytes]]:
    """`item.count` windows of held-out documents or a few more, and the documents."""
    rows: list[Row] = []
    texts: list[bytes] = []
    for text in heldout_texts(item.source, max_bytes=item.count * width * 8):
        if len(rows) >= item.count:
            break
        rows += windows([tokenizer.pad_id, *tokenizer.encode(text), tokenizer.pad_id], width)
        texts.append(text.encode())
    return rows, texts


def _answers(item: Eval, tokenizer: Tokenizer, width: int) -> tuple[list[Row], list[bytes]]:
    """Held-out conversations that fit, with the mask of their answers, and these answers."""
    rows: list[Row] = []
    texts: list[bytes] = []
    for row in heldout_rows(item.source, item.count):
        messages = training_messages(row, item.source.path)
        rendered = render(messages, tokenizer)
        if len(rendered.tokens) <= width:
            rows.append((rendered.tokens, rendered.mask))
            texts += [turn["content"].encode(errors="replace") for turn in messages if turn["role"] == "assistant"]
    if not rows:
        raise UserError(f"evals.{item.name}: no held-out conversation fits in model.max_len {width}")
    return rows, texts


METRICS: dict[str, Callable[[Eval, Subject], Measured]] = {
    "bits_per_byte": bits_per_byte,
    "reward": reward,
    "pair_accuracy": pair_accuracy,
    "best_of_n": best_of_n,
    "pass_at_k": pass_at_k,
}
