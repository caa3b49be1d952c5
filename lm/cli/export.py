"""Write the model of a run as a folder that transformers and other programs read.

The folder has config.json, *.safetensors, the tokenizer's files with the chat
template, and a model card (README.md). A stage trained with LoRA is written as
an adapter in PEFT's format, or with --merge as a whole model; a reward model
as a classifier of sequences with one label, always whole:

  lm export quickstart out/quickstart
  lm export quickstart out/sft --stage sft --dtype bfloat16
  lm export RUN out/merged --stage dpo --merge
  lm export FOLDER out/merged --adapter ADAPTER
  lm export FOLDER out/half --dtype float16     a published model, written again"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm.cli.arguments import MODEL_HELP, find_model, number
from lm.experiment import Experiment, LoRA, UserError
from lm.stored import new_folder

TAKES_OVERRIDES = False
ENVIRONMENT = {"JAX_PLATFORMS": "cpu"}  # takes no device from a run; the limit is the host's memory
DTYPES = ("float32", "bfloat16", "float16")
SECONDS = 5  # between two lines of progress


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; new, or empty")
    parser.add_argument("--stage", metavar="NAME", help="export the model after this stage; else after the last one")
    parser.add_argument("--adapter", metavar="FOLDER", action="append", default=[], help="add a PEFT adapter")
    parser.add_argument("--merge", action="store_true", help="merge adapters into the weights")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the weights; else that of the open weights for a run from open weights, or the parameters'",
    )
    parser.add_argument(
        "--shard-gb",
        metavar="GB",
        type=number(1e-6, 1e6),
        help="maximum gigabytes per file; else 5, or the same files as the open weights",
    )


def call(arguments: argparse.Namespace) -> int:
    run_dir, stage = find_model(arguments.run, arguments.stage)
    os.environ.update(ENVIRONMENT)

    from lm.interop.export import family_of, published_config, write
    from lm.interop.peft import write_adapter
    from lm.model.lora import linears, merged
    from lm.model.quantised import dequantised
    from lm.train.loaded_run import load_adapters, load_reward_model, load_run, origin_of
    from lm.train.run_files import read_run
    from lm.web.model_card import model_card

    if stage is not None and (judge := load_reward_model(run_dir, stage)):
        return export_reward_model(run_dir, stage, *judge, arguments)
    with new_folder(arguments.out) as draft:
        loaded, *others = load_adapters(load_run(run_dir, stage), run_dir, arguments.adapter).values()
        if others:
            raise UserError(f"--adapter is given {len(others) + 1} times; an export takes one")
        origin, lora = origin_of(run_dir), _adapter_of(loaded)
        longest = published_config(loaded.model, origin)["max_position_embeddings"]
        files = loaded.tokenizer.published_files(longest)
        if arguments.merge and not any(one.lora or one.earlier for _, one in linears(loaded.model)):
            raise UserError(f"--merge is for a model with adapters (lora.rank); {arguments.run} has none")
        library = "peft" if lora.rank and not arguments.merge else "transformers"
        if stage is not None:
            card = model_card(read_run(run_dir), loaded.stage, loaded.step, library, loaded.tokenizer.chats)
            files["README.md"] = card.encode()
        ids = _token_ids(loaded.tokenizer, loaded.tokenizer.pad_id)
        size = None if arguments.shard_gb is None else int(1e9 * arguments.shard_gb)
        if lora.rank and not arguments.merge:
            base, family = _base_of(loaded.experiment, loaded.stage), family_of(loaded.model, origin)
            write_adapter(loaded.model, draft, family, base, lora.rs_lora, arguments.dtype)
        else:
            write(
                merged(dequantised(loaded.model), arguments.dtype), draft, dtype=arguments.dtype, origin=origin, shard_bytes=size,
                token_ids=ids, progress=_progress(),
            )  # fmt: skip
        written = _write_beside(draft, origin, files)
    after = f", after stage {stage}, step {loaded.step}" if stage else ""
    print(f"{run_dir}{after}\n{arguments.out}: {len(written)} files, {sum(written) / 1e6:,.1f} MB")
    return 0


def _token_ids(tokenizer: Any, pad: int | None) -> dict[str, Any]:
    """Ids of special tokens for `config.json`, as the tokenizer's files declare them."""
    first = tokenizer.document_ids[0] if tokenizer.bos_id is None else tokenizer.bos_id
    return {"bos_token_id": first, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad}


def on_interrupt(arguments: argparse.Namespace) -> str:
    """What an interrupted export leaves."""
    return f"{arguments.out} is not written: the same command begins anew"


def export_reward_model(run_dir: Path, stage: str, tokenizer: Any, scorer: Any, arguments: argparse.Namespace) -> int:
    """Write a reward model, with its adapters merged, as a classifier of sequences with one label."""
    from lm.interop.export import published_config, write
    from lm.model.lora import merged
    from lm.model.quantised import dequantised
    from lm.train.loaded_run import origin_of
    from lm.train.run_files import read_run
    from lm.web.model_card import model_card

    if arguments.adapter:
        raise UserError(f"--adapter is for language models; stage {stage} of {run_dir} trains a reward model")
    run = read_run(run_dir)
    step = next(one.steps_done for one in run.stages if one.name == stage)
    size = None if arguments.shard_gb is None else int(1e9 * arguments.shard_gb)
    # Where padding is also the end of an answer, other programs would look for the score before it.
    pad = None if tokenizer.pad_id in tokenizer.end_ids else tokenizer.pad_id
    ids = _token_ids(tokenizer, pad)
    origin = origin_of(run_dir)
    with new_folder(arguments.out) as draft:
        write(
            merged(dequantised(scorer), arguments.dtype), draft, dtype=arguments.dtype, origin=origin,
            shard_bytes=size, token_ids=ids, progress=_progress(),
        )  # fmt: skip
        card = model_card(run, stage, step, "transformers", tokenizer.chats, scores=True)
        longest = published_config(scorer.body, origin)["max_position_embeddings"]
        files = tokenizer.published_files(longest) | {"README.md": card.encode()}
        written = _write_beside(draft, origin, files)
    print(f"{run_dir}, reward model of stage {stage}, step {step}")
    print(f"{arguments.out}: {len(written)} files, {sum(written) / 1e6:,.1f} MB")
    return 0


def _write_beside(draft: Path, origin: Any, files: dict[str, bytes]) -> list[int]:
    """Write the files beside the weights, with those of the origin; returns the sizes of all."""
    copied = {} if origin is None else {name: text.encode("latin-1") for name, text in origin.files.items()}
    for name, content in (copied | files).items():
        (draft / name).write_bytes(content)
    return [file.stat().st_size for file in draft.iterdir()]


def _adapter_of(loaded: Any) -> LoRA:
    """The LoRA config of the loaded stage; rank 0 if it trained no adapter."""
    return next((one.lora for one in loaded.experiment.stages if one.name == loaded.stage), LoRA())


def _base_of(experiment: Experiment, stage: str) -> str:
    """Name of an adapter's base model; "" if the run trained it. Raises UserError if the base cannot be exported or named."""
    from lm.train.base import adapter_stage, base_stage

    names = [one.name for one in experiment.stages]
    at = base_stage(experiment, names.index(stage))
    if at is None and experiment.init:
        return Path(experiment.init.partition(":")[2]).name
    before = adapter_stage(experiment, at)
    if at is None or before is not None or experiment.adapter:
        factors = names[before] if before is not None else experiment.adapter
        what = "random weights" if at is None else f"the model of stage {names[at]}, which has factors of {factors}"
        raise UserError(f"the base of the adapter of stage {stage} is {what}: use --merge to write the whole model")
    return ""


def _progress() -> Callable[[int, int], None]:
    """A function that prints the number of megabytes written, at most every few seconds."""
    said = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > SECONDS:
            said = time.monotonic()
            print(f"written {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", file=sys.stderr, flush=True)

    return show
