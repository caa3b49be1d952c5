"""Our TFDS builder prepares ArrayRecord without TensorFlow, and `tfds:` reads it back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lm.data.python_docs import documents
from lm.data.sources import load_rows
from lm.experiment import UserError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.mark.slow
def test_prepared_on_first_use_and_read_back(data_dir):
    rows = load_rows("tfds:python_docs/small/train", data_dir=data_dir)
    step = len(documents()) // 200
    assert list(rows) == list(documents()[::step])
    assert "tensorflow" not in sys.modules
    files = list(data_dir.rglob("*.array_record*"))
    assert files
    again = load_rows("tfds:python_docs/small/train", data_dir=data_dir)
    assert again.fingerprint == rows.fingerprint
    assert files == list(data_dir.rglob("*.array_record*"))


def test_the_default_folder_is_the_one_of_tfds(data_dir):
    code = "from lm.data.sources import load_rows; print(load_rows('tfds:python_docs/small/train').fingerprint)"
    environment = {**os.environ, "TFDS_DATA_DIR": str(data_dir)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    fingerprint = load_rows("tfds:python_docs/small/train", data_dir=data_dir).fingerprint
    assert ran.stdout.split()[-1] == fingerprint


def test_unknown_names_splits_and_configs_are_told(data_dir):
    with pytest.raises(UserError, match=r"no split 'test'; the splits are train"):
        load_rows("tfds:python_docs/small/test", data_dir=data_dir)
    with pytest.raises(UserError, match=r"tfds:no_such_set: cannot be opened .*lm itself has python_docs"):
        load_rows("tfds:no_such_set/train", data_dir=data_dir)
    with pytest.raises(UserError, match="tfds:python_docs/tiny"):
        load_rows("tfds:python_docs/tiny/train", data_dir=data_dir)
