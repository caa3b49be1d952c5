"""A vocabulary trained once: runs with the same texts share it, as they share their tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import sentencepiece

from lm.data.cache import Writer, current_cache
from lm.data.tokenizer import FILE_NAME, SubwordTokenizer


def train_tokenizer(texts: list[str], vocab_size: int, folder: Path) -> SubwordTokenizer:
    """Train a tokenizer, or take the cached one of the same texts; saves it into `folder`."""
    hashed = hashlib.sha256()
    for text in texts:
        hashed.update(text.encode(errors="surrogatepass") + b"\0")

    def build(writer: Writer) -> None:
        model = SubwordTokenizer.train(texts, vocab_size, folder)
        writer.append("model", np.frombuffer(model.model, np.uint8))

    made_of = {"texts": hashed.hexdigest(), "vocab_size": vocab_size, "sentencepiece": sentencepiece.__version__}
    entry = current_cache().entry("vocabulary", made_of, build, "the vocabulary")
    if not (folder / FILE_NAME).is_file():
        SubwordTokenizer(entry.path("model").read_bytes()).save(folder)
    return SubwordTokenizer.load(folder)
