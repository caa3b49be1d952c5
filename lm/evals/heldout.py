"""Held-out measurements, one function a metric: bits per byte here, the others from their files."""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable

from lm.evals.answers import best_of_n, pass_at_k, reward
from lm.evals.examples import read_examples
from lm.evals.pairs import pair_accuracy
from lm.evals.rows import Measured, Subject, row_logp
from lm.experiment import Eval
from lm.model.transformer import Transformer


def measure(item: Eval, subject: Subject) -> Measured:
    """What `item` asks for, of this model."""
    return METRICS[item.metric](item, subject)


def bits_per_byte(item: Eval, subject: Subject[Transformer]) -> Measured:
    """Bits that the model needs for each byte of held-out text: of documents, or of the answers in conversations.

    Documents begin and end with the end-of-text token; the ends' bits count, their bytes do not. A document that
    is longer than the context is cut into windows, which start without memory. For them there is what `xz -9e` needs.
    Of a conversation the assistant's turns and their ends are predicted, given all before.
    """
    model = subject.model
    width = model.config.max_len
    found = read_examples(item, subject.tokenizer, width, subject.talks)
    nats, size = -float(row_logp(model, found.encoded, width).sum()), sum(map(len, found.texts))
    predicted = sum(sum(mask) for _, mask in found.encoded)
    values = {"bits_per_byte": nats / math.log(2) / size, "loss": nats / predicted, "bytes": float(size)}
    if found.documents:
        packed = len(lzma.compress(b"\n\n".join(found.texts), preset=9 | lzma.PRESET_EXTREME))
        values["xz_bits_per_byte"] = 8 * packed / size
    return Measured(values, len(found.encoded))


METRICS: dict[str, Callable[[Eval, Subject], Measured]] = {
    "bits_per_byte": bits_per_byte,
    "reward": reward,
    "pair_accuracy": pair_accuracy,
    "best_of_n": best_of_n,
    "pass_at_k": pass_at_k,
}
