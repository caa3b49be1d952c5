"""Folders of data sets, as Hugging Face's datasets library saves them and as their repositories hold them, are sources."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from lm.data import workers
from lm.data.pipeline import make_feed
from lm.data.selection import check_sources
from lm.data.sources import load_rows
from lm.experiment import SFT, Experiment, Source, Stage, UserError
from lm.stored import cache_at

README = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: [main/part-*]
  - split: test
    path: main/test.jsonl
- config_name: other
  data_dir: other
{more}---
# A data set
"""


def rows(split: str, count: int = 4) -> list[dict]:
    return [{"instruction": f"{split} {number}?", "response": f"{number}."} for number in range(count)]


def arrow(file: Path, given: list[dict], features: dict | None = None, schema: pyarrow.Schema | None = None) -> None:
    """A stream of record batches with the library's note on the columns, as it writes them."""
    table = pyarrow.Table.from_pylist(given, schema)
    noted = {"huggingface": json.dumps({"info": {"features": features or {}}})}
    table = table.replace_schema_metadata(noted)
    file.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.ipc.new_stream(str(file), table.schema) as stream:
        stream.write_table(table, max_chunksize=3)


def saved(folder: Path, shards: list[list[dict]], split: str | None = None, **how) -> None:
    """A folder as `save_to_disk` leaves it."""
    names = [f"data-{number:05}-of-{len(shards):05}.arrow" for number in range(len(shards))]
    for name, given in zip(names, shards, strict=True):
        arrow(folder / name, given, **how)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names], "_split": split}))
    (folder / "dataset_info.json").write_text("{}")


def write(file: Path, given: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(given), file, compression="zstd")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in given))


@pytest.fixture
def splits(tmp_path) -> Path:
    """A saved DatasetDict, whose training rows are in two shards."""
    saved(tmp_path / "all" / "train", [rows("train")[:3], rows("train")[3:]])
    saved(tmp_path / "all" / "test", [rows("test")])
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return tmp_path / "all"


@pytest.fixture
def configs(tmp_path) -> Path:
    """A repository whose README names two configs."""
    folder = tmp_path / "named"
    write(folder / "main" / "part-1.json", rows("train")[:2])
    write(folder / "main" / "part-2.json", rows("train")[2:])
    write(folder / "main" / "test.jsonl", rows("test"))
    write(folder / "other" / "valid.parquet", rows("valid"))
    (folder / "README.md").write_text(README.format(more=""))
    return folder


def test_a_saved_folder_has_its_training_rows_and_its_splits_by_name(splits):
    assert list(load_rows(str(splits))) == list(load_rows(f"{splits}/train")) == rows("train")
    assert list(load_rows(f"{splits}/test")) == rows("test")
    write(splits / "train" / "more.jsonl", rows("more"))
    assert any("not read: test, train/more.jsonl" in note for note in load_rows(str(splits)).notes)
    with pytest.raises(UserError, match=r"no dev in .*; the splits are train, test: name one, as .*/all/train"):
        load_rows(f"{splits}/dev")


def test_a_repository_has_its_splits_by_the_names_of_its_files(tmp_path):
    folder = tmp_path / "clone"
    write(folder / "data" / "train-00000-of-00002.parquet", rows("train"))
    empty = pyarrow.Table.from_pylist(rows("train")[:1]).slice(0, 0)
    parquet.write_table(empty, folder / "data" / "train-00001-of-00002.parquet")
    write(folder / "data" / "validation_seen-00000-of-00001.parquet", rows("seen"))
    assert list(load_rows(str(folder))) == list(load_rows(f"{folder}/train")) == rows("train")
    assert any("1 files have no rows" in note for note in load_rows(str(folder)).notes)
    assert list(load_rows(f"{folder}/validation_seen")) == rows("seen")
    (folder / "data" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="1 of 2 files are missing, the first train-00000-of-00002"):
        load_rows(str(folder))


@pytest.mark.parametrize("layout", ["data/train.csv data/test.csv", "train/a.jsonl test/a.jsonl"])
def test_a_repository_with_plain_names_reads_no_test_rows_in_training(tmp_path, layout):
    train, test = layout.split()
    for name, split in ((train, "train"), (test, "test")):
        text = f"instruction,response\n{split} 0?,0.\n" if name.endswith("csv") else json.dumps(rows(split)[0])
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(load_rows(str(tmp_path))) == list(load_rows(f"{tmp_path}/train")) == rows("train", 1)
    assert list(load_rows(f"{tmp_path}/test")) == rows("test", 1)


def test_a_readme_names_configs(configs):
    assert list(load_rows(f"{configs}/main")) == list(load_rows(f"{configs}/main/train")) == rows("train")
    assert list(load_rows(f"{configs}/main/test")) == rows("test")
    assert list(load_rows(f"{configs}/other")) == rows("valid")
    with pytest.raises(UserError, match=r"the configs are main, other: name one, as .*/named/main"):
        load_rows(str(configs))
    with pytest.raises(UserError, match=r"no other/test .*the splits are validation"):
        load_rows(f"{configs}/other/test")
    (configs / "README.md").write_text(README.format(more="  default: true\n"))
    assert list(load_rows(str(configs))) == rows("valid")


@pytest.mark.parametrize("path", ["../secret.jsonl", "/etc/passwd", "https://example.org/a.jsonl"])
def test_no_file_outside_of_the_folder_is_read(tmp_path, splits, path):
    state = json.dumps({"_data_files": [{"filename": path}]})
    (splits / "test" / "state.json").write_text(state)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files: {path}\n---\n")
    (tmp_path / "secret.jsonl").write_text("{}")
    for source in (splits, tmp_path):
        with pytest.raises(UserError, match=r"none outside|must be a pattern inside this folder"):
            load_rows(str(source))


def test_columns_are_as_the_library_gives_them(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "calls": [{"x": None, "y": 1}]}]
    label = {"_type": "ClassLabel", "names": ["bad", "good"]}
    given = [{"messages": turns, "kind": 1, "label": 1, "tools": ['{"a": [1]}'], "raw": b"\xff", "none": None}]
    schema = pyarrow.Table.from_pylist(given).schema.set(0, pyarrow.field("messages", pyarrow.large_list(
        pyarrow.struct({"role": pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), "content": pyarrow.large_string(),
                        "calls": pyarrow.list_(pyarrow.struct({"x": pyarrow.int8(), "y": pyarrow.int8()}))}))))  # fmt: skip
    features = {"kind": label, "label": label, "tools": {"_type": "List", "feature": {"_type": "Json"}}}
    saved(tmp_path, [given], features=features, schema=schema)
    turns[1]["calls"] = [{"y": 1}]
    found = load_rows(str(tmp_path))
    assert list(found) == [{"messages": turns, "kind": "good", "label": 1, "tools": [{"a": [1]}], "none": None}]
    assert "columns of images, audio or other bytes are not read: raw" in found.notes


def test_turns_saved_as_lists_of_roles_and_texts_are_turns(tmp_path, tokenizer):
    saved(tmp_path / "a", [[{"conversations": {"from": ["human", "gpt"], "value": [f"{i}?", "so"]}} for i in range(3)]])
    stage = Stage("sft", SFT(), (Source(str(tmp_path / "a"), holdout=0.0),), steps=1, batch_size=1, seq_len=64)
    assert "3 conversations" in make_feed(stage, tokenizer, 0).report()


@pytest.mark.slow
def test_batches_of_a_saved_folder_do_not_depend_on_processes_and_its_columns_have_other_names(
    splits, tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr(workers, "WORTH_BYTES", 0)
    source = Source(str(splits), columns=("prompt=instruction", "completion=response"), holdout=0.0)
    stage = Stage("sft", SFT(), (source,), steps=1, batch_size=1, seq_len=256)
    made = []
    for count in (1, 2):
        monkeypatch.setattr(workers, "cores", lambda count=count: count)
        with cache_at(tmp_path / f"cache{count}"):
            feed = make_feed(stage, tokenizer, 0)
            made.append((feed.fingerprint, feed.report(), feed.batch(0).tokens.tolist()))
    assert made[0] == made[1]
    assert "4 conversations" in made[0][1]


def test_one_split_by_two_names_has_one_holdout(splits):
    def check(*paths: str) -> None:
        stages = (Stage(f"s{i}", SFT(), (Source(p, holdout=i / 2),), steps=1) for i, p in enumerate(paths))
        check_sources(Experiment(name="x", stages=tuple(stages)))

    check(f"{splits}/train", f"{splits}/test")
    with pytest.raises(UserError, match="give both the same holdout"):
        check(str(splits), f"{splits}/train")


def test_files_of_a_plain_folder_are_all_read_and_told_from_splits(tmp_path):
    for name, split in (("train", "train"), ("test", "test"), ("part-00000-of-00001", "more")):
        write(tmp_path / f"{name}.jsonl", rows(split))
    found = load_rows(str(tmp_path))
    assert list(found) == rows("more") + rows("test") + rows("train")
    assert any("named after splits (test, train), and all are read" in note for note in found.notes)
    assert list(load_rows(f"{tmp_path}/train")) == rows("train")


@pytest.mark.parametrize("content", [b"", b"junk" * 50, None])
def test_a_damaged_arrow_file_is_told(splits, content):
    file = splits / "test" / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:200] if content is None else content)
    with pytest.raises(UserError, match="not a complete Arrow file"):
        load_rows(f"{splits}/test")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("all/train/state.json", '{"_data_files": true}', "must list the files"),
        ("all/train/state.json", json.dumps({"_data_files": [{"filename": "a" * 300}]}), "is missing"),
        ("named/README.md", README.format(more="").replace("data_dir: other", f"data_dir: {'a' * 300}"), ""),
        ("named/README.md", "---\nx: 2020-99-99\n---\n", ""),
    ],
    ids=["a flag", "a long name", "a long folder", "no date"],
)
def test_odd_files_beside_the_rows_are_harmless_or_told_in_one_line(splits, configs, tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    path = str((tmp_path / name).parent.parent if "state" in name else tmp_path / "named" / "main")
    try:
        assert list(load_rows(path)) and not said
    except UserError as error:
        assert said in str(error) and "\n" not in str(error)


def test_offsets_beyond_the_text_are_told_and_not_read(tmp_path):
    offsets = np.array([0, 3, 2**31 - 1, 5], np.int32)  # pyarrow would end the process
    texts = pyarrow.StringArray.from_buffers(3, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"a" * 8))
    batch = pyarrow.record_batch([texts], ["text"])
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), batch.schema) as file:
        file.write_batch(batch)
    with pytest.raises(UserError, match="damaged in record batch 0"):
        list(load_rows(str(tmp_path / "a.arrow")))


@pytest.mark.parametrize("declared", [b"{}", b'{"splits": []}'])
def test_a_data_set_that_declares_no_splits_is_refused_in_one_line(tmp_path, declared):
    (tmp_path / "dataset_dict.json").write_bytes(declared)
    with pytest.raises(
        UserError, match=r"must list the names of the splits|declare no splits; fetch the data set again"
    ):
        load_rows(str(tmp_path))
