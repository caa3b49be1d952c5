"""Held-out metrics: the table of metric functions, and bits per byte."""

from __future__ import annotations

import functools
import lzma
import math
from collections.abc import Callable

from lm.evals.answers import best_of_n, pass_at_k, reward
from lm.evals.choices import Choices, choice_accuracy, continuation_accuracy
from lm.evals.continuations import score_continuations
from lm.evals.core import core_score
from lm.evals.examples import read_examples
from lm.evals.pairs import pair_accuracy
from lm.evals.rows import Measured, Subject, rounded, row_logp
from lm.experiment import Eval
from lm.model.transformer import Transformer


def measure(item: Eval, subject: Subject) -> Measured:
    """Measure an eval's metric on a model."""
    return METRICS[item.metric](item, subject)


def bits_per_byte(item: Eval, subject: Subject[Transformer]) -> Measured:
    """Metric `bits_per_byte`: the model's code length of held-out text, of documents or of answers in conversations.

    Documents begin and end with the end-of-text token; the end's bits count, its bytes do not. A document that
    is longer than the context is split into independent windows. The result of `xz -9e` is reported for comparison.
    In conversations the assistant's turns and their end tokens are predicted from all preceding text.
    """
    model = subject.model
    width = model.config.max_len
    found = read_examples(item, subject.tokenizer, width, subject.talks)
    longest = rounded(max(len(tokens) for tokens, _ in found.encoded), width)
    nats, size = -float(row_logp(model, found.encoded, longest).sum()), sum(map(len, found.texts))
    predicted = sum(sum(mask) for _, mask in found.encoded)
    values = {"bits_per_byte": nats / math.log(2) / size, "loss": nats / predicted, "bytes": float(size)}
    if found.documents:
        values["xz_bits_per_byte"] = 8 * _xz_size(b"\n\n".join(found.texts)) / size
    return Measured(values, len(found.encoded))


@functools.lru_cache(maxsize=4)  # the same text is measured after every stage
def _xz_size(text: bytes) -> int:
    """The number of bytes that `xz -9e` makes of a text, without the 64 MB in which it looks for repetitions of a longer one."""
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(4096, len(text))}
    return len(lzma.compress(text, filters=[lzma2]))


def _of_choices(metric: Callable[[Eval, Subject, list[Choices]], Measured]) -> Callable[[Eval, Subject], Measured]:
    """A metric of rows of choices, which are read here."""
    return lambda item, subject: metric(
        item, subject, read_examples(item, subject.tokenizer, subject.model.config.max_len).encoded
    )


def core(item: Eval, subject: Subject[Transformer]) -> Measured:
    """Metric `core`: the CORE score of a folder of tasks."""
    found = read_examples(item, subject.tokenizer, subject.model.config.max_len)
    return core_score(functools.partial(score_continuations, subject.model), found.encoded)


METRICS: dict[str, Callable[[Eval, Subject], Measured]] = {
    "bits_per_byte": bits_per_byte,
    "reward": reward,
    "pair_accuracy": pair_accuracy,
    "best_of_n": best_of_n,
    "pass_at_k": pass_at_k,
    "choice_accuracy": _of_choices(choice_accuracy),
    "continuation_accuracy": _of_choices(continuation_accuracy),
    "core": core,
}
