"""Real files of every format go through the feed of their stage. Skipped where the shared folder is missing."""

from __future__ import annotations

import pytest

from lm.data.pipeline import make_feed
from lm.data.prompts import make_prompt_feed
from lm.data.sources import load_rows
from lm.experiment import DPO, SFT, Pretrain, Source, Stage
from lm.rollout.verifiers import NEEDS, VERIFIERS

HOLDOUT = 0.02


@pytest.fixture(scope="module")
def data(golden):
    folder = golden.parent / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "objective"), [("pretrain", Pretrain()), ("sft", SFT()), ("preference", DPO())])
def test_every_small_file_feeds_its_stage(data, tokenizer, folder, objective):
    files = [path for path in sorted((data / folder).iterdir()) if path.stat().st_size < 600_000]
    assert files
    for path in files:
        stage = Stage("here", objective, (Source(str(path), holdout=HOLDOUT),), batch_size=2, seq_len=1024)
        feed = make_feed(stage, tokenizer, 0)
        assert feed.batch(0).weights.sum() > 0, path
        assert feed.supplies[0].rows > 0, path


def test_reasoning_files_give_prompts_whose_own_answer_is_right(data, tokenizer):
    for path in sorted((data / "reasoning").glob("*test.jsonl")):
        feed = make_prompt_feed((Source(str(path), holdout=HOLDOUT),), 4, 512, tokenizer, 0, columns=NEEDS["answer"])
        for row in feed.batch(0).rows:
            assert VERIFIERS["answer"](row, row["answer"]) == 1.0
        stage = Stage("here", SFT(), (Source(str(path), holdout=HOLDOUT),), batch_size=2, seq_len=512)
        assert make_feed(stage, tokenizer, 0).batch(0).weights.sum() > 0


def test_every_other_file_is_read(data):
    for path in sorted((data / "eval").iterdir()):
        assert len(load_rows(str(path))) > 0
