"""Every parser of a file that people write or copy gives a value or one line, whatever the bytes of the file are.

Rows are in `tests/data/test_any_rows.py`, files of runs and of the cache in `tests/train/test_damage.py`, models' folders in
`tests/interop/test_damaged.py` and `tests/data/test_published_files.py`.
"""

from __future__ import annotations

import contextlib
import json
import random
import zlib
from pathlib import Path

import pyarrow as pa
import pytest

from lm.data import columnar
from lm.data.hub.tokenizer import HubTokenizer
from lm.data.tokenizer import SubwordTokenizer
from lm.evals.core import read_core
from lm.experiment import UserError, to_dict
from lm.interop import gguf_file, peft
from lm.rollout.answer_rewards import json_schema
from lm.rollout.endpoint_judge import JudgeRecord, endpoint
from lm.rollout.environments.search import SearchIndex
from lm.rollout.environments.tool_dialogue import CalculatorDialogue
from lm.rollout.environments.tools import tool_replies
from lm.serve.protocol import Refused, parse
from lm.stored import read_json, write_json_atomic
from lm.sweep.journal import recover, storage
from lm.train.run_folder import RunFolder
from lm.train.run_list import run_state
from lm.train.trajectory_files import read_trajectories, trajectory_files
from lm.train.trajectory_writer import keep_trajectories
from lm.web.rollout_index import read_part, task_hash
from tests.train.test_damage import PLAN, mutated, reshaped
from tests.train.test_trajectory_files import STAGE, rollout

pytestmark = pytest.mark.slow
TIMES = 100
FIRST = (b"", b"[]", b"{}", b"\n", b"[" * 5000 + b"\n")  # the last is nested more deeply than a recursion may be

MODULES = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")]
JUDGE = {"url": "http://127.0.0.1:1/v1", "model": "m", "prompt": "{prompt} {completion}", "most": 10}
ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 1}, "bias": "none",
    "layers_to_transform": [0], "layers_pattern": "layers",
}  # fmt: skip


def lines(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def trajectories(folder: Path) -> bytes:
    keep_trajectories(folder, STAGE, 1, rollout())
    return trajectory_files(folder)[0].read_bytes()


def gguf_model() -> bytes:
    return (
        b"GGUF" + bytes([3, 0, 0, 0]) + bytes(8) + (1).to_bytes(8, "little") + _field("general.architecture", "llama")
    )


def _field(name: str, value: str) -> bytes:
    texts = [text.encode() for text in (name, value)]
    name_part, value_part = (len(text).to_bytes(8, "little") + text for text in texts)
    return name_part + (8).to_bytes(4, "little") + value_part


def read_step(file: Path) -> None:
    sealed = file.with_name(f"step-00000001-{zlib.crc32(file.read_bytes()):08x}.parquet")
    file.rename(sealed)
    try:
        read_part(sealed)
        read_trajectories(sealed)
    finally:
        sealed.unlink()


def read_judge_record(file: Path) -> None:
    JudgeRecord(file.parent)._file.close()


def read_search(file: Path) -> None:
    SearchIndex.of_file(str(file)).best("passage", 2)


def read_journal(file: Path) -> None:
    recover(file)
    storage(file).get_all_studies()


def journal() -> bytes:
    return lines({"op_code": 0, "worker_id": "w", "study_name": "s", "directions": [1]})


def arrow() -> bytes:
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]
    table = pa.Table.from_pylist([{"messages": turns, "key": str(number)} for number in range(4)])
    stream = pa.BufferOutputStream()
    with pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return stream.getvalue().to_pybytes()


def read_arrow(file: Path) -> None:
    name, changed = str(file), file.stat().st_mtime_ns
    for spans in columnar.locate(name, file):
        columnar.python_columns(
            columnar.block(name, file, changed, int(spans[0, 0] // columnar.GROUP)),
            columnar.converters_of(name, file, changed),
        )


def read_request(file: Path) -> None:
    for chat in (True, False):
        try:
            parse(file.read_bytes(), chat)
        except Refused as error:
            json.dumps(error.body(), ensure_ascii=False).encode()  # as the response is written


def read_tasks(file: Path) -> None:
    (file.parent / "eval_data").mkdir()
    (file.parent / "eval_data" / "a.jsonl").write_bytes(lines(*({"context": "a", "continuation": "b"} for _ in "ab")))
    (file.parent / "eval_meta_data.csv").write_text("Eval Task,Random baseline\na,25\n")
    read_core(file.parent)


def read_last_line(file: Path) -> None:
    stage = RunFolder(file.parent).stage_folder("sft")
    stage.mkdir(parents=True)
    write_json_atomic(file.parent / "experiment.json", to_dict(PLAN))
    file.rename(stage / file.name)
    run_state(file.parent)


def tokenizer_file() -> bytes:
    """A tokenizer.json with a part of every kind, and few words."""
    names = ("</s>", "[UNK]", "a", "##b", "text")
    special = {"id": "</s>", "ids": [0], "tokens": ["</s>"]}
    around = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    whole = {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "</s>", "special": True, "single_word": False, "lstrip": False, "rstrip": True, "normalized": False}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing", "single": around, "pair": around, "special_tokens": {"</s>": special}},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9,
            "vocab": {name: index for index, name in enumerate(names)},
        },
    }  # fmt: skip
    return json.dumps(whole).encode()


def read_tokenizer(file: Path, end: str = "</s>") -> None:
    (file.parent / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    found = HubTokenizer.load(file.parent)
    for text in ("a text", "\u9f98</s>", "a" * 20):
        ids = found.encode(text)
        assert max(ids, default=0) < found.vocab_size
        found.decode(ids, specials=True)


def read_sentencepiece(file: Path) -> None:
    """As a tokenizer trained here, and as that of a published model; where one refuses it, the other may not."""
    with contextlib.suppress(UserError):
        found = SubwordTokenizer.load(file)
        assert found.decode(found.encode("some text")) == "some text"
    read_tokenizer(file, "<|im_end|>")


TASKS = b"icl_tasks:\n- label: a\n  dataset_uri: a.jsonl\n  num_fewshot: [0]\n  icl_task_type: language_modeling\n"
REQUEST = {
    "model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "n": 2, "stop": ["a"],
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}, "logprobs": True,
}  # fmt: skip

# name of the file, its content, its reader
PARSERS = {
    "Arrow": ("a.arrow", arrow(), read_arrow),
    "request": ("request.json", json.dumps(REQUEST).encode(), read_request),
    "last line": ("metrics.jsonl", lines({"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}), read_last_line),
    "task": (
        "task.json",
        json.dumps({"question": "q", "answer": "a"}).encode(),
        lambda file: task_hash(file.read_text(errors="replace")),
    ),
    "CORE tasks": ("core.yaml", TASKS, read_tasks),
    "trajectories": ("a.parquet", b"", read_step),
    "adapter_config.json": (
        "adapter_config.json",
        json.dumps(ADAPTER).encode(),
        lambda file: peft._ranks(peft._checked(read_json(file)), MODULES),
    ),
    "GGUF": ("a.gguf", gguf_model(), gguf_file.read_metadata),
    "judge": ("judge.json", json.dumps(JUDGE).encode(), lambda file: endpoint(str(file))),
    "judge recording": ("judge-0.jsonl", lines({"request": "a", "reply": "7"}), read_judge_record),
    "schema": (
        "schema.json",
        json.dumps({"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}}).encode(),
        lambda file: json_schema(str(file))({}, '{"a": 1}'),
    ),
    "passages": ("a.jsonl", lines(*({"title": f"t{i}", "text": f"passage {i}"} for i in range(4))), read_search),
    "tool calls": (
        "a.txt",
        b'<tool_call>{"name": "calculate", "arguments": {"expression": "1+2"}}</tool_call><tool>calculate: 1</tool>',
        lambda file: tool_replies(file.read_text(errors="replace"), CalculatorDialogue.tools),
    ),
    "tokenizer.json": ("tokenizer.json", tokenizer_file(), read_tokenizer),
    "sentencepiece": ("tokenizer.model", SubwordTokenizer.train(["some text"] * 9, 300).model, read_sentencepiece),
    "journal": ("journal.log", journal(), read_journal),
}


@pytest.mark.parametrize("kind", PARSERS)
def test_a_mutated_file_is_read_or_refused_in_one_line(kind, tmp_path):
    name, content, read = PARSERS[kind]
    content = content or trajectories(tmp_path)
    draw, file = random.Random(kind), tmp_path / "whole" / name
    file.parent.mkdir()
    file.write_bytes(content)
    read(file)
    for number in range(TIMES):
        data = FIRST[number] if number < len(FIRST) else mutated(content, draw)
        if number >= len(FIRST) and number % 2 and name.endswith(("json", "jsonl")):  # one part of a JSON value
            rows = content.splitlines() if name.endswith("jsonl") else [content]
            place = draw.randrange(len(rows))
            rows[place] = json.dumps(reshaped(json.loads(rows[place]), draw)).encode()
            data = b"\n".join(rows) + b"\n"
        folder = tmp_path / str(number)
        folder.mkdir()
        file = folder / name
        file.write_bytes(data)
        try:
            read(file)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
