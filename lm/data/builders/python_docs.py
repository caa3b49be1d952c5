"""TFDS builder `python_docs`: the documentation of this Python installation as an ArrayRecord data set."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import tensorflow_datasets as tfds

from lm.data import python_docs

SMALL = 200  # documents of the config `small`


class PythonDocs(tfds.core.GeneratorBasedBuilder):
    """Rows of `text` and `key`; config `full` has every document, `small` one in a few."""

    VERSION = tfds.core.Version("{}.{}.{}".format(*sys.version_info))  # that of the Python which it documents
    BUILDER_CONFIGS = [  # noqa: RUF012 (the name and the list are TFDS's)
        tfds.core.BuilderConfig(name="full", description="every document"),
        tfds.core.BuilderConfig(name="small", description=f"about {SMALL} documents, evenly spread"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Documentation and docstrings carried by Python {self.VERSION}.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "key": tfds.features.Text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        documents = python_docs.documents()
        step = max(1, len(documents) // SMALL) if self.builder_config.name == "small" else 1
        yield from enumerate(documents[::step])
