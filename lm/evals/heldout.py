"""Held-out measurements, one function a metric: bits per byte, reward of answers, accuracy on pairs."""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from lm.data.chat import preference_messages, prompt_messages, render, training_messages
from lm.data.packing import left_pad
from lm.data.pipeline import heldout_rows, heldout_texts
from lm.data.tokenizer import Tokenizer
from lm.experiment import Eval, UserError
from lm.model.transformer import Transformer
from lm.objectives.logprobs import token_logprobs
from lm.parallel.distributed import fetch
from lm.rollout.sampler import decode_rows, generate
from lm.rollout.verifiers import VERIFIERS
from lm.types import Batch

ROWS = 64  # rows in one forward pass or one batch of samples: bounds memory, and one shape compiles once
SHOWN = 12  # examples kept for people to read

Row = tuple[list[int], list[int]]  # token ids, and for each 1 where it is to be predicted


@dataclass(frozen=True)
class Measured:
    """Numbers of one evaluation, and a few examples for people."""

    values: dict[str, float]
    count: int
    examples: list[dict[str, Any]] = field(default_factory=list)


def measure(
    item: Eval, model: Transformer, tokenizer: Tokenizer, reference: Transformer | None = None, seed: int = 0
) -> Measured:
    """What `item` asks for, of this model. `reference` is what pair accuracy compares with."""
    return METRICS[item.metric](item, model, tokenizer, reference, seed)


@jax.jit
def _row_logp(model: Transformer, batch: Batch) -> Float[Array, " B"]:
    """Weighted sum of the log-probabilities of each row, in nats."""
    return (token_logprobs(model, batch).logp * batch.weights).sum(axis=1)


def row_logp(model: Transformer, rows: list[Row], width: int) -> Float[np.ndarray, " N"]:
    """Log-probability of the masked tokens of each (tokens, mask) row, in nats; rows are right padded to `width`."""
    found: list[np.ndarray] = []
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        tokens, weights, segments = (np.zeros((ROWS, width), kind) for kind in (np.int32, np.float32, np.int32))
        for i, (ids, mask) in enumerate(part):
            tokens[i, : len(ids)], weights[i, : len(ids)], segments[i, : len(ids)] = ids, mask, 1
        positions = np.broadcast_to(np.arange(width, dtype=np.int32), (ROWS, width))
        found.append(fetch(_row_logp(model, Batch(tokens, weights, segments, positions)))[: len(part)])
    return np.concatenate(found)


def windows(ids: list[int], width: int) -> list[Row]:
    """Rows of at most `width` tokens in which every token but the first is predicted exactly once."""
    return [(ids[i : i + width], [0] + [1] * (len(ids[i : i + width]) - 1)) for i in range(0, len(ids) - 1, width - 1)]


def bits_per_byte(
    item: Eval, model: Transformer, tokenizer: Tokenizer, reference: Transformer | None, seed: int
) -> Measured:
    """Bits that the model needs for each byte of held-out text: of documents, or of the answers in conversations.

    Documents begin and end with the end-of-text token; the ends' bits count, their bytes do not. A document that
    is longer than the context is cut into windows, which start without memory. For them there is what `xz -9e` needs.
    Of a conversation the assistant's turns and their ends are predicted, given all before; one that does not fit in
    the context is left out, and not counted.
    """
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


def reward(item: Eval, model: Transformer, tokenizer: Tokenizer, reference: Transformer | None, seed: int) -> Measured:
    """Mean reward of answers to held-out prompts, how many end by themselves, and how long they are."""
    rows = heldout_rows(item.source, item.count)
    prompts = [render(prompt_messages(row, item.source.path), tokenizer, generation_prompt=True).tokens for row in rows]
    room = model.config.max_len - item.max_new_tokens
    kept = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
    if not kept:
        raise UserError(
            f"evals.{item.name}: none of {len(rows)} held-out prompts fits in model.max_len {model.config.max_len} "
            f"less {item.max_new_tokens} new tokens"
        )
    width = min(room, -(-max(len(prompts[i]) for i in kept) // 16) * 16)
    rewards, lengths, ends, examples = [], [], [], []
    for start in range(0, len(kept), ROWS):
        part = kept[start : start + ROWS]
        filled = part + part[-1:] * (ROWS - len(part))
        tokens, sizes = left_pad([prompts[i] for i in filled], width, tokenizer.pad_id)
        out = fetch(
            generate(
                model, tokens, sizes, jax.random.fold_in(jax.random.key(seed), start), item.temperature,
                max_new_tokens=item.max_new_tokens, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id,
            )
        )  # fmt: skip
        answered = decode_rows(tokenizer, out.tokens, out.mask)
        for i, answer, size in zip(part, answered, out.mask.sum(1), strict=False):
            score = VERIFIERS[item.verifier](rows[i], answer.text)
            rewards.append(score)
            lengths.append(float(size))
            ends.append(answer.eos)
            said = {"prompt": _last_turn(rows[i]), "answer": answer.text, "expected": str(rows[i].get("answer", ""))}
            examples.append(said | {"reward": score})
    values = {
        "reward": float(np.mean(rewards)),
        "reward_stderr": float(np.std(rewards) / math.sqrt(len(rewards))),
        "eos_rate": float(np.mean(ends)),
        "length": float(np.mean(lengths)),
    }
    return Measured(values, len(kept), examples[:SHOWN])


def pair_accuracy(
    item: Eval, model: Transformer, tokenizer: Tokenizer, reference: Transformer | None, seed: int
) -> Measured:
    """How often the chosen answer has the higher implicit reward, log π(y) - log π_ref(y); a tie counts half.

    Source: DPO, arXiv 2305.18290, eq. 5. Pairs that do not fit in the context are left out, and not counted.
    """
    rows, sides = [], []
    for row in heldout_rows(item.source, item.count):
        turns = preference_messages(row, item.source.path)
        pair = [(tokens, _last_span(mask)) for tokens, mask in (render(side, tokenizer) for side in turns)]
        if max(len(ids) for ids, _ in pair) <= model.config.max_len:
            rows.append(row)
            sides += pair
    if not rows:
        raise UserError(f"evals.{item.name}: no held-out pair fits in model.max_len {model.config.max_len}")
    width = min(model.config.max_len, -(-max(len(ids) for ids, _ in sides) // 16) * 16)
    logp = row_logp(model, sides, width)
    ratio = logp - (row_logp(reference, sides, width) if reference is not None else 0.0)
    margin = ratio[0::2] - ratio[1::2]
    examples = [
        {
            "prompt": _last_turn(row),
            "chosen": _text(row["chosen"]),
            "rejected": _text(row["rejected"]),
            "margin": float(m),
        }
        for row, m in zip(rows[:SHOWN], margin, strict=False)
    ]
    values = {"pair_accuracy": float(np.mean((margin > 0) + 0.5 * (margin == 0))), "margin": float(margin.mean())}
    return Measured(values, len(rows), examples)


METRICS: dict[str, Callable[..., Measured]] = {
    "bits_per_byte": bits_per_byte,
    "reward": reward,
    "pair_accuracy": pair_accuracy,
}


def _last_turn(row: dict) -> str:
    return prompt_messages(row, "row")[-1]["content"]


def _text(answer: str | list[dict]) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]


def _last_span(mask: list[int]) -> list[int]:
    """The last run of ones: of a long conversation, the answer that is compared."""
    end = len(mask) - mask[::-1].index(1)
    start = end
    while start and mask[start - 1]:
        start -= 1
    return [0] * start + [1] * (end - start) + [0] * (len(mask) - end)
