"""Config of an experiment: model, tokenizer, mesh, stages and evals, and questions that are answered from it alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from lm.config.field import UserError, knob, nearest
from lm.config.lora import LoRA
from lm.config.model import Mesh, Model, RolloutMesh, Tokenizer
from lm.config.objective import environment_knob, max_turns_knob, reward_seconds_knob
from lm.config.stage import Source, Stage


@dataclass(frozen=True)
class Eval:
    name: str = knob(help="name of the eval, as in tables and in Stage.evals", name=True)
    source: Source = knob(help="source of the held-out examples")
    metric: Literal[
        "bits_per_byte",
        "reward",
        "pair_accuracy",
        "best_of_n",
        "pass_at_k",
        "choice_accuracy",
        "continuation_accuracy",
        "core",
    ] = knob(
        "reward",
        "what is measured; choice_accuracy: log-likelihood of given choices; core: CORE score of a folder of tasks; best_of_n needs a reward model, pair_accuracy one or a preference stage",
    )
    verifier: str = knob("answer", "metrics reward, best_of_n and pass_at_k: verifier, or FILE:FUNCTION of your own")
    count: int = knob(
        200,
        "number of held-out examples (bits_per_byte: rows of tokens; core: items of each task)",
        least=1,
        most=10**9,
    )
    max_new_tokens: int = knob(64, "maximum length of an answer in tokens", least=1, most=2**26)
    temperature: float = knob(0.0, "sampling temperature; 0: greedy decoding", least=0.01, most=100, special=0)
    best_of: int = knob(16, "metrics best_of_n and pass_at_k: answers sampled for each prompt", least=1, most=2**16)
    reward_seconds: float = reward_seconds_knob()
    environment: str = environment_knob()
    max_turns: int = max_turns_knob()
    asked_as: Literal["text", "chat"] = knob(
        "text", "metrics of choices: the choice continues the question as text, or is the answer in the chat format"
    )


@dataclass(frozen=True)
class Experiment:
    name: str = knob(help="name of the run; its folder is runs/NAME", name=True, affects_training=False)
    stages: tuple[Stage, ...] = knob(help="training stages, in order")
    evals: tuple[Eval, ...] = knob(
        (), "held-out measurements taken before and after every stage", affects_training=False
    )
    prompts: tuple[str, ...] = knob(
        ("What is an LLM?",), "prompts that the model answers at every evaluation", affects_training=False
    )
    seed: int = knob(0, "random seed of parameter initialisation, data order and sampling", least=0, most=2**32 - 1)
    tokenizer: Tokenizer = Tokenizer()
    model: Model = Model()
    mesh: Mesh = knob(Mesh(), affects_training=False)
    rollout_mesh: RolloutMesh = knob(RolloutMesh(), affects_training=False)
    init: str = knob(
        "", "open weights that the first stage starts from, hf:FOLDER or gguf:FILE; empty: random initial weights"
    )
    adapter: str = knob(
        "", "folder of a PEFT adapter on the open weights of init, whose factors do not train; empty: none"
    )
    sinks: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = knob(
        (), "where the run's numbers are shown besides its own files; empty: nowhere", affects_training=False
    )


COLLECTED = "collected:"
"""Prefix of the path of a source written by an earlier Collect stage; the name of that stage follows."""


def rows_per_update(stage: Stage) -> int:
    """Rows of tokens in one optimizer update, over all devices."""
    return stage.objective.rows_per_update(stage.batch_size)


def updates_per_step(stage: Stage) -> int:
    """Optimizer updates in one step of the loop; more than 1 only where several updates share a rollout."""
    return stage.objective.updates_per_step


def start_of(experiment: Experiment, index: int) -> int | None:
    """Index of the stage whose model stage `index` starts from: its `start`, else the nearest earlier one with a language model."""
    earlier = list(enumerate(experiment.stages[:index]))
    name = experiment.stages[index].start
    speaks = [i for i, s in earlier if s.objective.produces == "policy" and name in ("", s.name)]
    return speaks[-1] if speaks else None


def adapters_before(experiment: Experiment, index: int) -> tuple[LoRA, ...]:
    """The adapters of the stages whose models stage `index` starts from, which its model keeps, first to last."""
    start = start_of(experiment, index)
    if start is None:
        return ()
    own = experiment.stages[start].lora
    return (*adapters_before(experiment, start), *((own,) if own.rank else ()))


def reward_names(stage: Stage) -> tuple[str, ...]:
    """The reward models that a stage reads, as NAME or RUN:NAME."""
    return stage.objective.reward_model_names


def rows_per_example(stage: Stage) -> int:
    """Rows of a batch that belong to one example and stay in one microbatch: 2 for a preference pair, else 1."""
    return stage.objective.rows_per_example


def resolve_sources(experiment: Experiment) -> Experiment:
    """The experiment with every eval's `stage:NAME` (or `stage:NAME.2`) replaced by that stage's first (or third) source.

    Raises:
        UserError: there is no such stage, or no such source of it.
    """
    known = {
        name: source
        for stage in experiment.stages
        for number, source in enumerate(stage.sources)
        for name in ((f"stage:{stage.name}",) if number == 0 else ()) + (f"stage:{stage.name}.{number}",)
    }

    def resolved(item: Eval) -> Eval:
        path = item.source.path
        if path.startswith("stage:") and path not in known:
            raise UserError(f"evals.{item.name}.source.path is {path!r}{nearest(path, known)}")
        return dataclasses.replace(item, source=known.get(path, item.source))

    return dataclasses.replace(experiment, evals=tuple(map(resolved, experiment.evals)))
