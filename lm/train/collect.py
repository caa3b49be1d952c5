"""Collect stages: sample answers, judge them, and write rows that later stages train on.

Files in the stage's folder: answers.jsonl (a row of `prompt` and `answers` for each prompt), labels.jsonl (the choices,
in the label page's format), made.jsonl (preference pairs or conversations: the source `collected:STAGE`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from lm.between_batches import calling_between_batches
from lm.choices.desk import Desk, standing
from lm.choices.export import preferences, write_rows
from lm.choices.log import open_log, read_log
from lm.choices.pairs import Answer as Answered
from lm.choices.pairs import Pair, make_task, text_of
from lm.config.collect import NO_LEAST
from lm.data.chat import plain_prompt, prompt_messages
from lm.data.sources import load_rows
from lm.experiment import Collect, Stage, UserError
from lm.json_lines import JsonLines, read_json_lines, rewrite_json_lines
from lm.model.heads import Scorer
from lm.model.transformer import Transformer, num_params
from lm.parallel.distributed import broadcast_from_main, fetch, is_main_process, run_on_main, to_devices
from lm.parallel.rules import batch_sharding
from lm.rollout.engine import LocalEngine
from lm.rollout.episodes import Tasks, make_tasks, sample_trajectories
from lm.rollout.rewards import timeout_metric
from lm.rollout.scores import check_finite, score_rows
from lm.rollout.trajectory import Rollout, Trajectory, rewards_of, sample_metrics, trajectory_batch
from lm.stored import file_sha256
from lm.train.callbacks import listener
from lm.train.collected import ROWS_FILE
from lm.train.goodput import Costs, seconds_spent
from lm.train.loop import Interrupted, RunContext, summarise
from lm.train.metrics import MetricsLog, Progress, json_value
from lm.train.signals import StoppedBySignal
from lm.train.trajectory_files import rewind_trajectories
from lm.train.trajectory_writer import keep_trajectories
from lm.train.watchdog import PATIENCE

ANSWERS, LABELS = "answers.jsonl", "labels.jsonl"
PEOPLE = "people"
ANSWER_FIELDS = {"answers": list}
HINTED = 2**30  # folded into a step's key for the answers to its prompts with the hint

Row = dict[str, Any]


def collect_stage(run: RunContext, index: int, model: Transformer, scorers: tuple[Scorer, ...], began: float) -> None:
    """Run a Collect stage, resumable at each step: sample answers, judge them, and write the collected rows.

    Raises:
        UserError: people have yet to label the answers (names the command for it), or no row could be made.
        Interrupted: a signal arrived; the answers so far are kept.
    """
    stage: Stage[Collect] = run.experiment.stages[index]
    o = stage.objective
    folder = run.folder.stage_folder(stage.name)
    run_on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    spent = seconds_spent(folder) if is_main_process() else 0.0
    costs = Costs(
        began, {"seconds": spent, "sample_seconds": spent}, spent
    )  # answers sampled in earlier sessions count
    with costs.of("sample_seconds"):
        sources = _sample(run, index, model, scorers, folder / ANSWERS, costs)
    note = run_on_main(lambda: MAKERS[o.make](folder, stage.name, o))
    report = run_on_main(
        lambda: f"{sum(1 for _ in (folder / ROWS_FILE).open())} rows made from {folder / ANSWERS}{note or ''}"
    )
    files = {name: file_sha256(folder / name) for name in (ANSWERS, LABELS, ROWS_FILE) if (folder / name).exists()}
    summarise(run.folder, stage, 0, num_params(model), str(report), sources, costs, {"files": files})
    if is_main_process():
        print(f"{stage.name}: {report}", flush=True)


def _sample(
    run: RunContext, index: int, model: Transformer, scorers: tuple[Scorer, ...], path: Path, costs: Costs
) -> list[dict[str, Any]]:
    """Sample and write the answers of all missing steps, scored by the judge unless people judge.

    Returns the counts of each source's prompts.
    """
    stage = run.experiment.stages[index]
    tasks = make_tasks(stage, run.tokenizer, run.experiment.seed, run.held_out)
    start = broadcast_from_main(lambda: _whole_steps(path, stage.batch_size))
    progress = Progress(stage.name, stage.steps, start)
    progress.show_activity("compiling")
    with MetricsLog(path.parent, listener(run.callbacks, stage.name)) as log:
        log.rewind(start)
        run_on_main(lambda: log.check_steps(start))
        run_on_main(lambda: rewind_trajectories(path.parent, start))
        for step in range(start, stage.steps):
            run.watchdog.expect(f"step {step + 1} of stage {stage.name}", PATIENCE)
            try:  # a signal ends the rollout on the way, and a resumed run repeats it
                with calling_between_batches(run.stop.check):
                    rows, line, tokens = _answer(run, index, model, scorers, tasks, step)
            except StoppedBySignal as stopped:
                kept = f"kept the answers of {step} of {stage.steps} steps of stage {stage.name}"
                raise Interrupted(f"{stopped}: {kept}") from stopped
            # Metrics first: if a kill prevents the answers from being written, the metrics are rewound.
            log.metrics({"step": step + 1, "time": costs.total()["seconds"], **line})
            run_on_main(functools.partial(_append, path, rows))
            progress.update(step + 1, line, tokens)
    progress.close()
    return tasks.feed.sources()


def _answer(
    run: RunContext, index: int, model: Transformer, scorers: tuple[Scorer, ...], tasks: Tasks, step: int
) -> tuple[list[Row], dict[str, float], int]:
    """Sample the answers of one step; returns rows, metrics, and the number of sampled tokens."""
    stage: Stage[Collect] = run.experiment.stages[index]
    o = stage.objective
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(run.experiment.seed), index), step)
    scored = functools.partial(_scored_answers, run, stage, model, scorers, step=step)
    found, scores, line = scored(tasks, key=key)
    groups = [found[start : start + o.answers] for start in range(0, len(found), o.answers)]
    made = [_row(group, marks, o.make == "prompts") for group, marks in zip(groups, scores, strict=True)]
    missed = [number for number, marks in enumerate(scores) if marks and max(marks) < o.least_score]
    if o.least_score > NO_LEAST:
        line["solved"] = 1 - len(missed) / len(made)
    if missed and tasks.privileged_feed:
        hinted = dataclasses.replace(tasks, feed=tasks.privileged_feed)
        more, again, metrics = scored(hinted, key=jax.random.fold_in(key, HINTED))
        for number in missed:
            made[number]["answers"] += [one.text for one in more[number * o.answers : (number + 1) * o.answers]]
            made[number]["scores"] += again[number] or []
        line["solved_with_hint"] = float(np.mean([max(row["scores"]) >= o.least_score for row in made]))
        line |= timeout_metric(int(sum(one.get("reward_timeouts", 0) for one in (line, metrics))))
        found += more
    folder = run.folder.stage_folder(stage.name)
    keep_trajectories(folder, stage, step + 1, Rollout([], found, np.zeros(len(found)), np.arange(0), {}))
    return made, line, sum(one.length for one in found)


def _scored_answers(
    run: RunContext,
    stage: Stage[Collect],
    model: Transformer,
    scorers: tuple[Scorer, ...],
    tasks: Tasks,
    *,
    step: int,
    key: PRNGKeyArray,
) -> tuple[list[Trajectory], list[list[float] | None], dict[str, float]]:
    """Sample the answers to each prompt of a step: trajectories, scores of each prompt's (None where people judge), metrics."""
    o = stage.objective
    engine = LocalEngine(model, run.tokenizer, layout=run.experiment.rollout_mesh)
    found, timeouts = sample_trajectories(
        engine, tasks, step, key, max_new_tokens=o.max_new_tokens, temperature=o.temperature,
        group_size=o.answers, judged=not (o.judge or scorers),
    )  # fmt: skip
    line = sample_metrics(found)
    if o.judge == PEOPLE:
        return found, [None] * (len(found) // o.answers), line
    judged = _scores(run, scorers, tasks, found, o.max_new_tokens) if scorers else rewards_of(found)
    check_finite(judged, [one.prompt for one in found], f"{stage.name}, step {step + 1}")
    line |= {"reward": float(judged.mean())} | timeout_metric(timeouts)
    return found, list(judged.reshape(-1, o.answers).astype(float).tolist()), line


def _scores(
    run: RunContext, scorers: tuple[Scorer, ...], tasks: Tasks, found: Sequence[Trajectory], width: int
) -> Float[np.ndarray, " B"]:
    """Score each answer with the reward models."""
    batch = trajectory_batch(found, tasks.feed.prompt_len, width, tasks.feed.tokenizer.pad_id)
    return np.asarray(fetch(score_rows(scorers, to_devices(batch, batch_sharding(run.mesh), None, len(found)))))


def _row(group: Sequence[Trajectory], scores: list[float] | None, with_task: bool) -> Row:
    turns = plain_prompt(group[0].task, "the prompt")
    prompt = turns[0]["content"] if len(turns) == 1 else turns
    made: Row = {"prompt": prompt, "answers": [one.text for one in group]}
    if with_task:
        made["task"] = json_value(dict(group[0].task))
    return made if scores is None else made | {"scores": scores}


def _whole_steps(path: Path, batch_size: int) -> int:
    """Number of complete steps in the answers file, from which the rows of an incomplete last step are removed."""
    lines = [raw for raw, _ in read_json_lines(path, ANSWER_FIELDS)]
    whole = len(lines) // batch_size
    if path.exists():
        rewrite_json_lines(path, lines[: whole * batch_size])
    return whole


def _append(path: Path, rows: list[Row]) -> None:
    file = JsonLines(path)
    try:
        file.append([json.dumps(row).encode() for row in rows])
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; fix that and run the same command again to resume"
        ) from error
    finally:
        file.close()


# ---- rows from answers ---------------------------------------------------------------------------------------------


def make_pairs(folder: Path, name: str, o: Collect) -> None:
    """Write preference rows from the judge's choice for every pair of answers; choices are kept as the label page does."""
    task = make_task(load_rows(str(folder / ANSWERS)))
    if o.judge == PEOPLE:
        _wait_for_people(folder, name, len(task.pairs))
    else:
        _decide(folder, o, task.pairs)
    exported = preferences(read_log(folder / LABELS).records)
    if not exported.rows:
        raise UserError(f"{name}: of {len(task.pairs)} pairs none was decided: there is nothing to train on")
    write_rows(folder / ROWS_FILE, exported.rows)


def _decide(folder: Path, o: Collect, pairs: Sequence[Pair]) -> None:
    """Record a choice for every undecided pair: the answer with the higher score, a tie for equal scores."""
    scores = {
        (text_of(row["prompt"]), answer): score
        for row in _rows_of(folder / ANSWERS)
        for answer, score in zip(row["answers"], row["scores"], strict=True)
    }
    name = f"the verifier {o.verifier}" if not o.judge else f"the reward model {o.judge}"

    def choose(pair: Pair, left: Answered, right: Answered) -> str:
        ours, theirs = (scores[text_of(pair.prompt), text_of(side.answer)] for side in (left, right))
        return "left" if ours > theirs else "right" if theirs > ours else "tie"

    with open_log(folder / LABELS) as log:
        Desk(pairs, log).decide(name, choose)


def _wait_for_people(folder: Path, name: str, count: int) -> None:
    labels = folder / LABELS
    done = len({record["pair"] for record in standing(read_log(labels).records)}) if labels.exists() else 0
    if done < count:
        raise UserError(
            f"{name}: {count - done} of {count} pairs wait for people: `lm label {folder / ANSWERS} --labels {labels}`, then "
            "the same command again"
        )


def make_conversations(folder: Path, name: str, o: Collect) -> None:
    """Write SFT rows from the answers that reach `least_score`: each prompt's best (rejection sampling, arXiv:2307.09288,
    section 3.2.3), or all different ones (STaR, arXiv:2203.14465; RFT, arXiv:2308.01825).

    Raises:
        UserError: no answer reaches it.
    """
    rows = []
    for number, row in enumerate(_rows_of(folder / ANSWERS), start=1):
        asked = prompt_messages(row, f"{folder / ANSWERS} line {number}")
        right = [(text, s) for text, s in zip(row["answers"], row["scores"], strict=True) if s >= o.least_score]
        texts = list(dict.fromkeys(text for text, _ in right))[: o.most_answers or None]
        if o.make == "best":
            texts = [max(right, key=lambda one: one[1])[0]] if right else []
        rows += [{"messages": [*asked, {"role": "assistant", "content": text}]} for text in texts]
    if not rows:
        raise UserError(
            f"{name}: none of the answers in {folder / ANSWERS} reaches {name}.objective.least_score {o.least_score:g}: there is "
            "nothing to train on; a lower one, more answers for each prompt, easier prompts or a hint help"
        )
    write_rows(folder / ROWS_FILE, rows)


def make_prompts(folder: Path, name: str, o: Collect) -> str:
    """Write the tasks whose pass rate is from `least_pass` to `most_pass`, with the column `pass_rate`, and more copies of hard ones.

    A prompt gives no signal to a group's advantages if all of its answers pass, or none does (DAPO, arXiv:2503.14476, section 3.2);
    sampling in proportion to 1 - pass rate is that of Kimi k1.5 (arXiv:2501.12599, section 2.3.3).
    Returns how many prompts are left out.

    Raises:
        UserError: no prompt is left.
    """
    rows = []
    rates = []
    for row in _rows_of(folder / ANSWERS, {"task": dict}):
        wrong, answers = sum(score < o.least_score for score in row["scores"]), len(row["scores"])
        rate = (answers - wrong) / answers
        rates.append(rate)
        if o.least_pass <= rate <= o.most_pass:
            copies = -(-o.most_copies * wrong // answers)  # rounded up
            rows += [row["task"] | {"pass_rate": rate}] * copies
    if not rows:
        raise UserError(
            f"{name}: none of the {len(rates)} prompts in {folder / ANSWERS} has a pass rate from {o.least_pass:g} to {o.most_pass:g} below "
            f"1; they are from {min(rates):g} to {max(rates):g}: there is nothing to train on"
        )
    write_rows(folder / ROWS_FILE, rows)
    counts = {
        f"below least_pass {o.least_pass:g}": sum(rate < o.least_pass for rate in rates),
        f"above most_pass {o.most_pass:g}, or always solved": sum(rate > o.most_pass or rate == 1 for rate in rates),
    }
    return f"; of {len(rates)} prompts left out: {', '.join(f'{count} {why}' for why, count in counts.items())}"


def _rows_of(path: Path, fields: Mapping[str, type] = {}) -> list[Row]:
    """Read the rows of answers.jsonl. Raises UserError if a row lacks one of the fields, or a score for an answer."""
    rows = [row for _, row in read_json_lines(path, {**ANSWER_FIELDS, "scores": list, **fields})]
    for number, row in enumerate(rows, start=1):
        if [type(score) for score in row["scores"]] != [float] * len(row["answers"]) or not row["answers"]:
            raise UserError(f"{path}:{number} lacks a score for each answer: put back a copy of the file")
    return rows


MAKERS = {"pairs": make_pairs, "best": make_conversations, "all": make_conversations, "prompts": make_prompts}
