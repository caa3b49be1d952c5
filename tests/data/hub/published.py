"""Published tokenizers and their cases, from the folder of `--models`."""

import functools
import gzip
import json
from pathlib import Path

from lm.data.hub.files import READ, SENTENCEPIECE, TOKENIZER_JSON
from lm.data.hub.tokenizer import HubTokenizer, TypedControl, with_options


def read(path: Path) -> bytes:
    """A file, or what is in it with .gz behind its name."""
    return path.read_bytes() if path.is_file() else gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())


def has(folder: Path, name: str) -> bool:
    return (folder / name).is_file() or (folder / f"{name}.gz").is_file()


def families(config) -> list[str]:
    """The folders of tokenizers with cases; none where the folder of models is missing."""
    folder = Path(config.getoption("--models")) / "tokenizers"
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(one.name for one in found if has(one, "cases.json"))


def cases(folder: Path, name: str = "cases.json") -> dict:
    return json.loads(read(folder / name))


def files(folder: Path, without: str = "") -> dict[str, bytes]:
    return {name: read(folder / name) for name in READ if name != without and has(folder, name)}


@functools.lru_cache(maxsize=4)  # a family's tests follow one another
def tokenizer(folder: Path, typed_control: TypedControl = "text", template: str | None = None) -> HubTokenizer:
    return HubTokenizer(with_options(files(folder), typed_control, template))


@functools.lru_cache(maxsize=1)
def of_sentencepiece(folder: Path) -> HubTokenizer:
    """The tokenizer of the sentencepiece model beside a `tokenizer.json`."""
    assert has(folder, SENTENCEPIECE)
    return HubTokenizer(files(folder, without=TOKENIZER_JSON))
