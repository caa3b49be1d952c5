"""Answer prompts with the model of a run.

The prompts are the experiment's own, or yours:

  lm sample quickstart --prompt "What is an LLM?" --stage sft
  lm sample quickstart --raw --prompt "The module " --temperature 0.8"""

from __future__ import annotations

import argparse

from lm.cli.arguments import RUN_HELP, add_sampling, find_run, find_stage, sampling
from lm.web.text import visible

TAKES_OVERRIDES = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--prompt", metavar="TEXT", nargs="+", action="extend", help="what to ask; else the experiment's prompts"
    )
    parser.add_argument("--raw", action="store_true", help="continue the text instead of asking as in a chat")
    add_sampling(parser, temperature=0.0, max_new_tokens=128)


def call(arguments: argparse.Namespace) -> int:
    run_dir = find_run(arguments.run)
    stage = find_stage(run_dir, arguments.stage)

    from lm.rollout.sampler import generate_text
    from lm.train.models import load_run

    loaded = load_run(run_dir, stage)
    prompts = arguments.prompt or list(loaded.experiment.prompts)
    answers = generate_text(
        loaded.model, loaded.tokenizer, prompts, **sampling(arguments), seed=arguments.seed, raw=arguments.raw
    )
    print(f"{run_dir}, after stage {stage}")
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"\n> {prompt}\n{visible(answer.text)}")
        if not answer.eos:
            print(f"[cut at {arguments.max_new_tokens} tokens]")
    return 0
