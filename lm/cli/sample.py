"""Answer prompts with the model of a run.

The prompts are the experiment's own, or yours:

  lm sample quickstart --prompt "What is an LLM?" --stage sft
  lm sample quickstart --raw --prompt "The module " --temperature 0.8
  lm sample rlhf --stage sft --best-of 16 --temperature 1"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lm.cli.arguments import MODEL_HELP, add_sampling, at_least, find_model, sampling
from lm.experiment import UserError
from lm.web.text import visible

if TYPE_CHECKING:
    from lm.train.loaded_run import LoadedRun

TAKES_OVERRIDES = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=MODEL_HELP)
    parser.add_argument(
        "--prompt", metavar="TEXT", nargs="+", action="extend", help="prompts; else the experiment's prompts"
    )
    parser.add_argument("--raw", action="store_true", help="continue the text, without the chat format")
    parser.add_argument(
        "--best-of",
        metavar="N",
        type=at_least(1, 2**16),
        default=1,
        help="show the best of N answers by a reward model",
    )
    parser.add_argument("--reward", metavar="NAME", help="that reward model's stage, or RUN:STAGE; else the run's last")
    add_sampling(parser, temperature=0.0, max_new_tokens=128)


def call(arguments: argparse.Namespace) -> int:
    run_dir, stage = find_model(arguments.run, arguments.stage)

    from lm.train.compilations import keep_compilations
    from lm.train.loaded_run import load_adapters, load_run

    keep_compilations()
    adapters = load_adapters(load_run(run_dir, stage), run_dir, arguments.adapter)
    for name, loaded in adapters.items():
        title = f"{run_dir}, after stage {stage}" if stage else str(run_dir)
        print(f"{title}, adapter {name}" if name else title)
        _show_answers(loaded, run_dir, arguments)
    return 0


def _show_answers(loaded: LoadedRun, run_dir: Path, arguments: argparse.Namespace) -> None:
    """Print the model's answer to each prompt."""
    from lm.rollout.engine import generate_text

    prompts = arguments.prompt or list(loaded.experiment.prompts)
    given = {"seed": arguments.seed} | sampling(arguments)
    scores = None
    if arguments.best_of > 1:
        if arguments.raw or arguments.temperature == 0:
            raise UserError(
                "--best-of chooses among different answers to a prompt: give it --temperature 1, and no --raw"
            )
        from lm.train.answers import best_answers

        answers, scores = best_answers(loaded, run_dir, prompts, arguments.best_of, arguments.reward, **given)
    else:
        answers = generate_text(loaded.model, loaded.tokenizer, prompts, raw=arguments.raw, **given)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        print(f"\n> {prompt}\n{visible(answer.text)}")
        if scores is not None:
            print(f"[score {scores[number]:.2f}, the best of {arguments.best_of}]")
        if not answer.eos:
            print(f"[cut at {arguments.max_new_tokens} tokens]")
