"""`lm eval --tasks` against lm-evaluation-harness with transformers: the same answers, and the time that they take.

    python benchmarks/against_harness.py MODEL --data FOLDER --peer PYTHON [--limit 500] [--rounds 1] [--tasks arc_easy,piqa]

MODEL is a folder in the published layout, PYTHON an interpreter that has lm-eval and transformers, FOLDER has the files of TASKS.
Each round measures both in turn, each from its start to its end, in float32. Then `lm` answers each task's request with the largest
difference again, in float64, which gives the error of both there. Prints Markdown, and keeps the rows in benchmarks/results/harness.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ASKED = {"doc_to_text": "{{query}}\nAnswer:", "doc_to_target": "{{gold}}", "doc_to_choice": "{{choices}}"}
AS_IS = ASKED | {"doc_to_text": "{{query}}"}
TYPED = {"until": ["\n"], "max_gen_toks": 16, "do_sample": False}
CHOICE = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}
SAID = {"output_type": "generate_until", "generation_kwargs": TYPED, "metric_list": [{"metric": "exact_match"}]}
TASKS: dict[str, dict[str, Any]] = {
    "arc_challenge.jsonl.gz": CHOICE | ASKED,
    "arc_easy.jsonl.gz": CHOICE | ASKED,
    "bbh.jsonl.gz": SAID | {"doc_to_text": "Q: {{question}}\nA:", "doc_to_target": "{{answer}}"},
    "blimp.jsonl.gz": CHOICE | {"doc_to_text": "", "doc_to_target": "{{0}}", "doc_to_choice": "{{[good, bad]}}"},
    "boolq.jsonl.gz": CHOICE | AS_IS,
    "commonsense_qa.jsonl.gz": CHOICE | AS_IS | {"fewshot_split": "test", "num_fewshot": 2},
    "copa.jsonl": CHOICE | AS_IS,
    "lambada_openai.jsonl.gz": {
        "output_type": "loglikelihood",
        "metric_list": [{"metric": "acc"}],
        "doc_to_text": "{{context}}",
        "doc_to_target": " {{continuation}}",
    },
    "mmlu_stem.jsonl.gz": CHOICE | ASKED,
    "openbook_qa.jsonl": CHOICE | AS_IS,
    "piqa.jsonl.gz": CHOICE | ASKED,
    "triviaqa.jsonl.gz": SAID | {"doc_to_text": "{{context}}", "doc_to_target": "{{answer}}"},
    "wikitext2_valid.jsonl.gz": {
        "output_type": "loglikelihood_rolling",
        "metric_list": [{"metric": "bits_per_byte"}],
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
    },
    "winogrande.jsonl.gz": CHOICE
    | {"doc_to_text": "{{gold}}", "doc_to_target": "{{continuation}}", "doc_to_choice": "{{context_options}}"},
}

Answers = dict[str, list[list[Any]]]
"""By task: for each item, what was answered to each of its requests."""
Texts = dict[str, list[list[list[Any]]]]
"""By task: for each item, the arguments of each of its requests."""


def write_tasks(data: Path, folder: Path, only: Sequence[str]) -> list[str]:
    """Write a task of the harness for each data file; returns their names."""
    names = []
    for file, task in TASKS.items():
        name = file.partition(".")[0]
        if (only and name not in only) or not (data / file).is_file():
            continue
        files = {"data_files": {"test": str((data / file).resolve())}}
        here = {"task": f"own_{name}", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(here | task | {"metadata": {"version": 1}}))
        names.append(f"own_{name}")
    return names


def measure_ours(model: str, tasks: Path, limit: int, place: Path) -> Answers:
    """The answers of `lm eval`, from an empty cache of answers; what compiles is kept where jax keeps it."""
    samples = place / "ours.jsonl"
    words = ["--tasks", str(tasks), "--limit", str(limit), "--no-chat", "--samples", str(samples)]
    subprocess.run(
        [sys.executable, "-m", "lm.cli.main", "eval", model, *words, "--cache", str(place / "cache")],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    found: Answers = {}
    for line in map(json.loads, samples.read_text().splitlines()):
        found.setdefault(line["task"], []).append(line["answers"])
    return found


def measure_peers(
    peer: str, model: str, tasks: Path, names: Sequence[str], limit: int, place: Path
) -> tuple[Answers, Texts]:
    """The answers of lm-evaluation-harness with transformers, and what was asked."""
    words = [
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=float32",
        "--device",
        "cpu",
        "--batch_size",
        "16",
    ]
    words += ["--tasks", ",".join(names), "--include_path", str(tasks), "--limit", str(limit), "--log_samples"]
    subprocess.run(
        [peer, "-m", "lm_eval", *words, "--output_path", str(place / "peers")], check=True, stdout=subprocess.DEVNULL
    )
    found: Answers = {}
    asked: Texts = {}
    for name in names:
        (file,) = place.glob(f"peers/**/samples_{name}_*.jsonl")
        lines = sorted(map(json.loads, file.read_text().splitlines()), key=lambda line: line["doc_id"])
        found[name] = [line["filtered_resps"] for line in lines]
        asked[name] = [[list(one.values()) for one in line["arguments"].values()] for line in lines]
    return found, asked


def compare(ours: Answers, peers: Answers, asked: Texts, exactly: Callable[..., float]) -> list[dict[str, Any]]:
    """For each task: items, how many were answered alike, the largest difference of a log-likelihood in nats, and both errors there.

    Args:
        exactly: gives the log-likelihood of a continuation after a context.
    """
    rows = []
    for name, items in peers.items():
        found = list(zip(ours[name], items, asked[name], strict=True))
        row = {"task": name, "items": len(items)}
        row["alike"] = sum(_choice(mine, texts) == _choice(theirs, texts) for mine, theirs, texts in found)
        gaps = [
            (abs(_nats(mine) - _nats(theirs)), _nats(mine), _nats(theirs), texts)
            for one in found
            for mine, theirs, texts in zip(*one, strict=True)
            if not _is_completion(texts)
        ]
        if gaps:
            gap, mine, theirs, texts = max(gaps, key=lambda one: one[0])
            row["nats"] = gap
            if len(texts) == 2:  # a whole text is asked in windows
                right = exactly(*texts)
                row |= {"our_error": abs(mine - right), "their_error": abs(theirs - right)}
        rows.append(row)
    return rows


def exact_model(model: str, place: Path) -> Callable[[str, str], float]:
    """Gives the log-likelihood in nats of a continuation after a context by a model in float64."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from lm_eval.api.instance import Instance

    from lm.evals.harness import Answers as Kept
    from lm.evals.harness import HarnessModel
    from lm.trained_model import load

    jax.config.update("jax_enable_x64", True)
    loaded = load(model).loaded
    graph, values = nnx.split(loaded.model)
    wide = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float64), values))
    wide.config = dataclasses.replace(wide.config, compute_dtype="float64", param_dtype="float64")
    asked = HarnessModel(wide, loaded.tokenizer, Kept(place / "exact.jsonl"))

    def exactly(context: str, said: str) -> float:
        return asked.loglikelihood([Instance("loglikelihood", {}, (context, said), 0)])[0][0]

    return exactly


def _is_completion(texts: Sequence[Any]) -> bool:
    """Whether a request asked for a text: its second argument has the settings of sampling."""
    return isinstance(texts[-1], dict)


def _nats(answer: Any) -> float:
    """The log-likelihood of an answer, which the harness writes as text."""
    return float(answer[0] if isinstance(answer, list) else answer)


def _choice(answers: Sequence[Any], asked: Sequence[Sequence[Any]]) -> Any:
    """What the harness judges: the likeliest choice, whether a continuation is the greedy one, or the text."""
    if _is_completion(asked[0]):
        return answers[0]
    if len(answers) > 1:
        return max(range(len(answers)), key=lambda place: _nats(answers[place]))
    return str(answers[0][1]) if isinstance(answers[0], list) else None


def tables(model: str, data: Path, peer: str, limit: int, rounds: int, only: Sequence[str]) -> str:
    """Measure, keep the rows, and give them as Markdown."""
    seconds: dict[str, list[float]] = {"lm": [], "harness": []}
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder, "tasks")
        tasks.mkdir()
        names = write_tasks(data, tasks, only)
        for number in range(rounds):
            place = Path(folder, str(number))
            place.mkdir()
            began = time.monotonic()
            ours = measure_ours(model, tasks, limit, place)
            between = time.monotonic()
            peers, asked = measure_peers(peer, model, tasks, names, limit, place)
            seconds["lm"].append(between - began)
            seconds["harness"].append(time.monotonic() - between)
        rows = compare(ours, peers, asked, exact_model(model, Path(folder)))
    kept = {"model": Path(model).name, "limit": limit, "seconds": seconds, "tasks": rows}
    _keep(kept)
    return "\n".join(_markdown(kept))


def _keep(found: Mapping[str, Any]) -> None:
    file = HERE / "results" / "harness.json"
    earlier = json.loads(file.read_text()) if file.exists() else []
    others = [one for one in earlier if (one["model"], one["limit"]) != (found["model"], found["limit"])]
    file.write_text(json.dumps([*others, found], indent=1) + "\n")


def _markdown(found: Mapping[str, Any]) -> list[str]:
    times = {name: statistics.median(values) for name, values in found["seconds"].items()}
    ratios = [b / a for a, b in zip(*found["seconds"].values(), strict=True)]
    return [
        "| task | items | answered alike | largest difference, nats | error of lm there | error of the harness there |",
        "|---|---|---|---|---|---|",
        *(
            f"| {one['task']} | {one['items']} | {one['alike']} | {_shown(one, 'nats')} | {_shown(one, 'our_error')} | "
            f"{_shown(one, 'their_error')} |"
            for one in found["tasks"]
        ),
        "",
        f"{found['model']}, first {found['limit']} items: lm {times['lm']:.0f} s, harness {times['harness']:.0f} s; "
        f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rounds)",
    ]


def _shown(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.1e}" if name in row else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--peer", default=os.environ.get("HARNESS_PY", ""), metavar="PYTHON")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tasks", type=lambda words: words.split(","), default=[])
    given = parser.parse_args()
    if not given.peer:
        parser.error("--peer PYTHON: an interpreter with lm-eval and transformers")
    print(tables(given.model, given.data, given.peer, given.limit, given.rounds, given.tasks))
