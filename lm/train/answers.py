"""Samples answers for comparison, from one model (several seeds or temperatures) or several models; and best-of-n."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lm.choices.export import write_rows
from lm.choices.pairs import Turns
from lm.data import chat
from lm.data.sources import load_rows
from lm.evals.pairs import last_span
from lm.evals.rows import rounded, row_scores
from lm.experiment import UserError
from lm.interop.peft import WEIGHTS
from lm.rollout.engine import TextCompletion, generate_text
from lm.stored import file_sha256, read_sealed, write_sealed
from lm.train.checkpoint import Checkpoints
from lm.train.loaded_run import LoadedRun, load_adapters, load_run
from lm.train.run_folder import RunFolder
from lm.train.scorers import scorers_for

BATCH = 32  # prompts per batch


@dataclass(frozen=True)
class Contestant:
    """A model whose answers are compared: a stage of a run, or open weights (stage ""), and a PEFT adapter on it."""

    run_dir: Path
    stage: str
    adapter: str = ""


@dataclass(frozen=True)
class SamplingRequest:
    """What to sample: `answers` completions per prompt from each contestant, cycling through the temperatures."""

    prompts: str
    limit: int
    answers: int
    temperatures: tuple[float, ...]
    max_new_tokens: int
    top_k: int
    top_p: float
    seed: int


def sample_rows(contestants: Sequence[Contestant], request: SamplingRequest, path: Path) -> bool:
    """Sample rows of `prompt`, `answers` and `sources` into `path`; returns False if the file exists already.

    The settings are written beside it, in a file of the same name ending in .json.

    Raises:
        UserError: the existing file has other settings or other model steps; there are no prompts, or one does not fit
            a model's context.
    """
    settings = _settings(contestants, request)
    beside = path.with_suffix(".json")
    if path.exists():
        _check_same(settings, beside, path)
        return False
    texts: list[list[str]] = []
    names = _names(contestants, request)
    prompts: list[Turns] = []
    for contestant in contestants:
        loaded = load_run(contestant.run_dir, contestant.stage or None)
        if contestant.adapter:
            (loaded,) = load_adapters(loaded, contestant.run_dir, [contestant.adapter]).values()
        prompts = prompts or _prompts(request, loaded)
        for number in range(request.answers):
            texts.append(list(_answers(loaded, prompts, request, number)))
    rows = [
        {"prompt": prompt, "answers": list(answers), "sources": names}
        for prompt, *answers in zip(prompts, *texts, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(beside, settings)
    write_rows(path, rows)
    return True


def _prompts(request: SamplingRequest, loaded: LoadedRun) -> list[Turns]:
    """The prompts of the file, or the experiment's `prompts` if no file is given."""
    if not request.prompts:
        prompts: list[Turns] = list(loaded.experiment.prompts[: request.limit])
        if not prompts:
            raise UserError(f"the experiment {loaded.experiment.name} has no prompts: name a file with --prompts FILE")
        return prompts
    rows = load_rows(request.prompts)
    turns = [chat.plain_prompt(rows[i], rows.where(i)) for i in range(min(len(rows), request.limit))]
    return [turn[0]["content"] if len(turn) == 1 else turn for turn in turns]


def _answers(loaded: LoadedRun, prompts: Sequence[Turns], request: SamplingRequest, number: int) -> Iterator[str]:
    """A model's answer number `number` to every prompt."""
    for start in range(0, len(prompts), BATCH):
        # An independent seed for each (answer number, batch).
        seed = int(np.random.SeedSequence([request.seed, number, start]).generate_state(1)[0] >> 1)
        batch = [chat.as_messages(prompt) for prompt in prompts[start : start + BATCH]]
        answers = generate_text(
            loaded.model, loaded.tokenizer, batch, seed=seed, temperature=_temperature(request, number),
            max_new_tokens=request.max_new_tokens, top_k=request.top_k, top_p=request.top_p,
        )  # fmt: skip
        yield from (answer.text for answer in answers)


def _temperature(request: SamplingRequest, number: int) -> float:
    return request.temperatures[number % len(request.temperatures)]


def _names(contestants: Sequence[Contestant], request: SamplingRequest) -> list[str]:
    """The name of each answer's source: the stage, with the run and the temperature if there are several."""
    several = len({contestant.run_dir for contestant in contestants}) > 1
    names = []
    for contestant in contestants:
        adapter = f"adapter {Path(contestant.adapter).name}" if contestant.adapter else ""
        parts = [str(contestant.run_dir) if several else "", contestant.stage, adapter]
        name = ", ".join(filter(None, parts)) or str(contestant.run_dir)
        for number in range(request.answers):
            hot = len(set(request.temperatures)) > 1
            names.append(f"{name}, temperature {_temperature(request, number):g}" if hot else name)
    return names


def _settings(contestants: Sequence[Contestant], request: SamplingRequest) -> dict[str, Any]:
    models = [
        {
            "run": str(contestant.run_dir.resolve()),
            "stage": contestant.stage,
            "step": max(Checkpoints(RunFolder(contestant.run_dir).checkpoints(contestant.stage)).steps(), default=None),
        }
        | ({"adapter": _digest(Path(contestant.adapter).expanduser() / WEIGHTS)} if contestant.adapter else {})
        for contestant in contestants
    ]
    data = load_rows(request.prompts).fingerprint if request.prompts else ""
    return json.loads(json.dumps({"models": models, "data": data, **asdict(request)}))


def _digest(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"--adapter: {file} does not exist")
    return file_sha256(file)


def _check_same(settings: dict[str, Any], beside: Path, path: Path) -> None:
    found = read_sealed(beside) if beside.exists() else {}
    differing = [name for name in settings if found.get(name) != settings[name]]
    if differing:
        raise UserError(
            f"{path} exists and was sampled with other settings ({', '.join(differing)}): label it as it is with "
            f"`lm label {path}`, or write the new answers to another file with --answers-file FILE"
        )


def best_answers(
    loaded: LoadedRun,
    run_dir: Path,
    prompts: Sequence[str],
    count: int,
    reward: str | None,
    **given: Any,
) -> tuple[list[TextCompletion], Float[np.ndarray, " P"]]:
    """Best-of-n: for each prompt the answer with the highest reward model score among `count`, and its score.

    Args:
        reward: STAGE or RUN:STAGE of the reward model; None: the run's last.
        given: sampling options of `generate_text`.

    Raises:
        UserError: there is no such reward model.
    """
    scorers = [s.name for s in loaded.experiment.stages if s.objective.produces == "scorer"]
    if reward is None and not scorers:
        raise UserError(f"{run_dir} has no reward model to choose by: name one of another run, --reward RUN:STAGE")
    (scorer,) = scorers_for(loaded.stored(run_dir), (reward or scorers[-1],))
    repeated = [prompt for prompt in prompts for _ in range(count)]
    answers = generate_text(loaded.model, loaded.tokenizer, repeated, **given)
    rows = []
    for prompt, answer in zip(repeated, answers, strict=True):
        said = [*chat.as_messages(prompt), *chat.as_messages(answer.text, "assistant")]
        tokens, mask = chat.render(said, loaded.tokenizer)[:2]
        rows.append((tokens, last_span(mask)))
    longest = max(len(tokens) for tokens, _ in rows)
    width = rounded(longest, longest + 15)  # an answer rendered again, with its end token, may have more tokens
    scores = row_scores(scorer, rows, width).reshape(-1, count)
    best = scores.argmax(axis=1)
    return [answers[i * count + k] for i, k in enumerate(best)], scores.max(axis=1)
