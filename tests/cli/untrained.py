"""A run of two stages whose models have learnt nothing, for commands that only need a run to be there."""

from pathlib import Path

import jax

from lm.data.curriculum import instruct_row
from lm.data.tokenizer import SubwordTokenizer
from lm.experiment import SFT, Experiment, Source, Stage, to_dict
from lm.model.transformer import Transformer
from lm.train.checkpoint import Checkpoints
from lm.train.run_folder import RunFolder
from tests.helpers import TINY


def write_untrained_run(path: Path, **fields) -> Path:
    """Write the run, with the stages `first` and `second`, and with these fields of its experiment."""
    folder = RunFolder(path)
    stages = tuple(Stage(name, SFT(), (Source("gen:instruct"),), seq_len=64) for name in ("first", "second"))
    folder.claim(to_dict(Experiment(name="small", stages=stages, model=TINY, **fields)))
    texts = [turn["content"] for index in range(200) for turn in instruct_row(index)["messages"]]
    vocab = SubwordTokenizer.train(texts, 384, folder.tokenizer).vocab_size
    for seed, stage in enumerate(stages):
        with Checkpoints(folder.checkpoints(stage.name)) as checkpoints:
            checkpoints.save(1, {"policy": Transformer(TINY, vocab, jax.random.key(seed))}, {})
    return folder.path
