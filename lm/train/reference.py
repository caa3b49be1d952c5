"""Reference log-probabilities of a stage's examples, computed once before the first step and cached in its folder."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Float32

from lm.data.pipeline import Feed
from lm.experiment import Stage
from lm.model.transformer import Transformer
from lm.objectives.logprobs import token_logprobs
from lm.parallel.distributed import broadcast_from_main, fetch, run_on_main, to_devices
from lm.stored import write_atomic
from lm.train.metrics import Progress
from lm.types import ReferencedPairBatch, TokenBatch

REFERENCE = "reference.npz"  # in a stage's folder
SEAL_BYTES = 64
Example = tuple[int, int]  # (source, number of the example in it)
ReferenceLogps = dict[
    Example, list[Float32[np.ndarray, " N"]]
]  # for each row of an example: log-probabilities of its tokens with weight > 0


def precompute_reference_logps(
    feed: Feed, model: Transformer, stage: Stage, place: NamedSharding, path: Path, before: Callable[[str], None]
) -> ReferenceLogps:
    """Reference log-probabilities of every example that the stage will see: read from `path`, else computed and written.

    Args:
        model: the reference.
        before: called with a description before each batch; may raise to stop.

    Returns:
        (source, example) -> a float32 array for each row of the example; complete on every process.
    """
    fingerprint = f"{feed.fingerprint} of {stage.steps} steps"
    if broadcast_from_main(lambda: _readable(path, fingerprint)):
        return _read(path)
    known = _compute(feed, model, stage, place, before)
    run_on_main(lambda: _write(path, fingerprint, known))
    return known


def add_ref_logp(batch: TokenBatch, feed: Feed, step: int, rows: Iterable[int], known: ReferenceLogps) -> TokenBatch:
    """Add `ref_logp` to a batch of these rows of the step; it is 0 for tokens of weight 0."""
    examples, each = feed.examples(step), feed.rows_each
    ref_logp = np.zeros(batch.weights.shape, np.float32)
    for place, row in enumerate(rows):
        ref_logp[place, batch.weights[place] > 0] = known[examples[row // each]][row % each]
    return ReferencedPairBatch(**vars(batch), ref_logp=ref_logp)


def _compute(
    feed: Feed, model: Transformer, stage: Stage, place: NamedSharding, before: Callable[[str], None]
) -> ReferenceLogps:
    """Compute the log-probabilities by one forward pass over the distinct examples, in batches of a step's size."""
    first: dict[Example, int] = {}  # position in the mixture where the example occurs first
    size, each = feed.batch_size, feed.rows_each
    for step in range(stage.steps):
        for at, example in enumerate(feed.examples(step)):
            first.setdefault(example, step * size + at)
    examples, known = list(first), {}
    progress = Progress(f"{stage.name} reference", -(-len(examples) // size))
    for turn, start in enumerate(range(0, len(examples), size), start=1):
        before(f"batch {turn} of the reference of stage {stage.name}")
        part = examples[start : start + size]
        batch = feed.at([first[example] for example in part + part[-1:] * (size - len(part))])
        logp = fetch(_logp(model, to_devices(batch, place, None, size * each)))
        for at, example in enumerate(part):
            known[example] = [logp[row, batch.weights[row] > 0] for row in range(at * each, (at + 1) * each)]
        progress.update(turn, {}, int((batch.segments > 0).sum()))
    progress.close()
    return known


@jax.jit
def _logp(model: Transformer, batch: TokenBatch) -> Float[Array, "B T"]:
    return token_logprobs(model, batch).logp


def _write(path: Path, fingerprint: str, known: ReferenceLogps) -> None:
    """Write the cache atomically, with the SHA-256 of its content as the archive's comment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for one in known.values() for row in one]
    stream = io.BytesIO()
    np.savez(
        stream,
        fingerprint=np.array(fingerprint),
        examples=np.array(list(known), np.int64),
        lengths=np.array([len(row) for row in rows], np.int64).reshape(len(known), -1),
        logp=np.concatenate(rows),
    )
    with zipfile.ZipFile(stream, "a") as archive:
        archive.comment = bytes(SEAL_BYTES)
    content = stream.getvalue()[:-SEAL_BYTES]
    write_atomic(path, content + _seal(content))


def _seal(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _readable(path: Path, fingerprint: str) -> bool:
    """Whether the cache exists, is intact, and belongs to the same data."""
    if not path.exists():
        return False
    content = path.read_bytes()
    if _seal(content[:-SEAL_BYTES]) != content[-SEAL_BYTES:]:
        print(f"{path} is damaged: the reference's log-probabilities are computed again", flush=True)
        return False
    with np.load(path) as arrays:
        return str(arrays["fingerprint"]) == fingerprint


def _read(path: Path) -> ReferenceLogps:
    with np.load(path) as arrays:
        lengths = arrays["lengths"]
        rows = iter(np.split(arrays["logp"], np.cumsum(lengths)[:-1]))
        examples: Iterator[Example] = ((int(source), int(number)) for source, number in arrays["examples"])
        return {example: [next(rows) for _ in range(lengths.shape[1])] for example in examples}
