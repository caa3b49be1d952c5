"""Tokenizers of experiments: loaded from a path, or trained once and shared by runs with the same texts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import sentencepiece

from lm.data.cache import Writer, current_cache
from lm.data.hub import files as hub_files
from lm.data.hub.gguf import tokenizer_files
from lm.data.hub.tokenizer import WHERE, HubTokenizer, TypedControl, with_options
from lm.data.text_tokenizer import TextTokenizer
from lm.data.tokenizer import FILE_NAME, SubwordTokenizer
from lm.experiment import Tokenizer, UserError


def is_tokenizer(path: Path) -> bool:
    """Whether a complete tokenizer is saved in a folder, or in a GGUF file."""
    return path.suffix == ".gguf" or any((path / name).is_file() for name in (FILE_NAME, hub_files.TOKENIZER_JSON))


def named_tokenizer(settings: Tokenizer) -> TextTokenizer:
    """The tokenizer that an experiment names. Raises UserError if it is missing or cannot be read."""
    template = None
    if settings.chat_template is not None:
        try:
            template = Path(settings.chat_template).expanduser().read_text()
        except (OSError, ValueError) as error:
            raise UserError(f"tokenizer.chat_template: {settings.chat_template} cannot be read: {error}") from error
    return load_tokenizer(settings.path or "", settings.typed_control, template, where=f"{WHERE} {settings.path}")


def load_tokenizer(
    path: str | Path,
    typed_control: TypedControl | None = None,
    template: str | None = None,
    where: str | None = None,
) -> TextTokenizer:
    """Read a tokenizer: a sentencepiece model trained by `train_tokenizer`, or a published model's, in a folder or GGUF file.

    Args:
        typed_control, template: options of a published model's tokenizer, see `HubTokenizer.with_options`.
        where: what an error names (None: the path).

    Raises:
        UserError: it is missing or cannot be read.
    """
    folder = Path(path).expanduser()
    where = where or str(folder)
    if folder.suffix == ".gguf":
        return HubTokenizer(with_options(tokenizer_files(folder), typed_control, template, where), where)
    published = (hub_files.TOKENIZER_JSON, hub_files.CONFIG)
    if any((folder / name).is_file() for name in published):
        return HubTokenizer.load(folder, typed_control, template, where)
    if template is not None or typed_control == "token":
        raise UserError(
            "tokenizer.typed_control and tokenizer.chat_template are for a published model's tokenizer; tokenizer.path "
            f"{path} is none"
        )
    return SubwordTokenizer.load(folder)


def same_vocabulary(one: TextTokenizer, other: TextTokenizer) -> bool:
    """Whether two tokenizers have the same token at every id, but for ids that one of them shows no text for."""
    if one.fingerprint == other.fingerprint or one.vocab_size != other.vocab_size:
        return one.fingerprint == other.fingerprint
    texts = ([each.decode([number], specials=True) for each in (one, other)] for number in range(one.vocab_size))
    return all(left == right or not (left and right) for left, right in texts)


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
