"""Plan a stage for TPUs or GPUs: memory, step time and layout.

By arithmetic in seconds on any machine, or with --compile by the TPU compiler,
which needs no TPU either:

  lm plan quickstart --topology v5e:2x2
  lm plan EXPERIMENT --topology h100:8
  lm plan EXPERIMENT --topology v5p:2x4x4 --compile --hlo step.hlo.txt.gz
  lm plan EXPERIMENT --topology v5p:2x4x4 --compile --libtpu DIR
  lm plan EXPERIMENT --topology v5p:2x4x4 --search --model.num-layers 32

A published model is planned with SFT of all weights in bfloat16:

  lm plan FOLDER --topology v5e:2x4 --sft.lora.rank 16

`--serve` plans the memory of `lm serve` on this machine instead, of an
experiment's model, a run's or a published one:

  lm plan RUN --serve --slots 16 --length 1024

Any knob of the experiment can be overridden; tokenizer.vocab_size is the size
of the vocabulary. Exits with 1 if the stage does not fit."""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

from lm.changes import read_experiment
from lm.cli.arguments import (
    EXPERIMENT_HELP,
    WEIGHTS_HELP,
    add_slots,
    at_least,
    check_stage,
    resolve,
    resolve_model,
    weights_of,
)
from lm.experiment import Model, UserError, from_dict
from lm.parent_death import end_with_parent, interrupt_blocked

TAKES_OVERRIDES = True
EXIT_DOES_NOT_FIT = 1
SHOWN = 20  # layouts
ENVIRONMENT = {"JAX_PLATFORMS": "cpu"}  # plan on the CPU, so that no device is taken from a run
DEFAULT = Model(param_dtype="bfloat16", compute_dtype="bfloat16", remat="full")  # of a published model


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "lm plan EXPERIMENT --topology CHIP:SHAPE [options] [--a.b.c VALUE ...]"
    parser.add_argument("experiment", metavar="EXPERIMENT", help=f"{EXPERIMENT_HELP}; {WEIGHTS_HELP}")
    parser.add_argument(
        "--topology",
        metavar="CHIP:SHAPE",
        help="one slice, such as v5e:4x4 or v5p:2x4x4, or the GPUs of a host, such as h100:8",
    )
    parser.add_argument(
        "--slices",
        metavar="N",
        type=at_least(1),
        default=1,
        help="slices joined by the data-centre network (%(default)s)",
    )
    parser.add_argument("--stage", metavar="NAME", help="this stage; else the one that needs the most memory")
    parser.add_argument("--compile", action="store_true", help="compile for the TPU: takes minutes, memory is exact")
    parser.add_argument(
        "--libtpu",
        metavar="PATH",
        help="compiler of --compile: a libtpu.so, or a folder with one (pip install --no-deps --target DIR "
        "libtpu==VERSION); else the one that the installed jax runs on TPU hosts",
    )
    parser.add_argument("--search", action="store_true", help="try every layout, and plan the fastest that fits")
    parser.add_argument("--serve", action="store_true", help="memory of `lm serve` on this machine")
    add_slots(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--hlo", metavar="FILE", type=Path, help="save the compiled text (.gz: compressed)")


def call(arguments: argparse.Namespace) -> int:
    if arguments.serve:
        return serving(arguments)
    if arguments.topology is None:
        raise UserError("--topology CHIP:SHAPE is missing, or --serve")
    return call_in_child(arguments) if arguments.compile else call_here(arguments)


def call_in_child(arguments: argparse.Namespace) -> int:
    """Plan in a child process, which a signal ends at once; returns the exit code.

    Python answers a signal when it is back from a compiler, which may take minutes. The compiler's files are in a folder of
    this process, which removes them after the child has ended.

    Raises:
        UserError: the compiler has ended its process.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        child = context.Process(target=_as_child, args=(arguments, folder), daemon=True)
        with interrupt_blocked():
            child.start()
        try:
            child.join()
        finally:
            child.kill()
            child.join()
    code = child.exitcode
    assert code is not None
    if code < 0:
        name = signal.Signals(-code).name
        raise UserError(f"{name} has ended the process of the TPU compiler: the machine may lack memory")
    return code


def _as_child(arguments: argparse.Namespace, folder: str) -> None:
    """Plan, with temporary files in a folder, and end the process with the exit code."""
    from lm.cli.main import exit_code

    end_with_parent()
    tempfile.tempdir = folder
    sys.exit(exit_code(functools.partial(call_here, arguments)))


def call_here(arguments: argparse.Namespace) -> int:
    """Plan in this process; returns the exit code."""
    experiment = resolve_model(arguments.experiment, arguments.overrides, DEFAULT)
    check_stage(arguments.stage, (stage.name for stage in experiment.stages), arguments.experiment)
    if arguments.hlo and not arguments.compile:
        raise UserError("--hlo saves the compiled program: it needs --compile")
    if arguments.libtpu is not None and not arguments.compile:
        raise UserError("--libtpu names the compiler: it needs --compile")
    os.environ.update(ENVIRONMENT)

    from lm.plan.advise import largest_batch, plan_stage, ways_to_fit, with_mesh
    from lm.plan.chips import parse_topology
    from lm.plan.libtpu import find_libtpu
    from lm.plan.plan import by_compiler
    from lm.plan.search import layouts
    from lm.plan.show import advice, layout, overview, show

    if arguments.compile:
        find_libtpu(arguments.libtpu)  # raises for a missing compiler before minutes of work
    topology = parse_topology(arguments.topology, arguments.slices)
    if arguments.compile and topology.chip.platform != "tpu":
        raise UserError(f"--compile asks the TPU compiler, and {topology.name} is of GPUs: plan it without")
    names = [arguments.stage] if arguments.stage else [stage.name for stage in experiment.stages]
    plans = [plan_stage(experiment, name, topology) for name in names]
    plan = max(plans, key=lambda plan: plan.bytes)
    found = layouts(experiment, plan.program.stage.name, topology) if arguments.search else []
    if found:
        plan = found[0]
        experiment = with_mesh(experiment, plan)
    if arguments.compile:
        plan = by_compiler(plan, arguments.hlo, arguments.libtpu)
    largest = largest_batch(plan, experiment)
    changes = [] if plan.fits else ways_to_fit(plan, experiment, largest)
    if arguments.json:
        stages = [{"stage": p.program.stage.name, "fits": p.fits, "hbm_bytes_per_device": p.bytes} for p in plans]
        extra = {
            "largest_batch_size": largest,
            "stages": stages,
            "layouts": [{"mesh": p.program.sizes, "fits": p.fits, "step_ms": 1e3 * p.step_s} for p in found],
            "advice": [" ".join(change.words) for change in changes],
        }
        print(json.dumps(plan.to_json() | extra, indent=1))
    else:
        if len(plans) > 1:
            print(overview(plans, "stage", names) + "\n")
        if found:
            print(overview(found[:SHOWN], "layout", map(layout, found)) + "\n")
        print(show(plan, largest))
        if not plan.fits:
            print("\n" + advice(changes, SHOWN // 4))
    return 0 if plan.fits else EXIT_DOES_NOT_FIT


def serving(arguments: argparse.Namespace) -> int:
    """Print the memory that `lm serve` needs for a model; returns the exit code."""
    from lm.algorithms.state import abstract_model
    from lm.open_weights import experiment_on
    from lm.serve.memory import LENGTH, LIBRARIES, default_slots, memory_of, sizes_for
    from lm.train.memory import device_memory

    name, weights = arguments.experiment, weights_of(arguments.experiment)
    run = next((one for one in (Path(name), Path("runs") / name) if (one / "experiment.json").is_file()), None)
    if weights is not None:
        experiment = experiment_on(str(weights), arguments.length or LENGTH)
    else:
        experiment = from_dict(read_experiment(run)) if run else resolve(name, arguments.overrides)
    model = abstract_model(experiment.model, experiment.tokenizer.vocab_size)
    sizes = sizes_for(model, arguments.slots or default_slots(), arguments.length, arguments.max_new_tokens)
    found, have = memory_of(model, sizes), device_memory()
    whole = found.weights + found.cache + LIBRARIES
    if arguments.json:
        told = {"weights_bytes": found.weights, "cache_bytes": found.cache, "libraries_bytes": int(LIBRARIES)}
        print(json.dumps(vars(sizes) | told | {"bytes": int(whole), "fits": whole <= have}, indent=1))
    else:
        print(f"{sizes.slots} slots, prompts and completions of {sizes.length} tokens, {sizes.new} of them new")
        print(
            f"{found}, libraries and programs about {LIBRARIES / 1e9:.1f} GB: {whole / 1e9:.2f} of {have / 1e9:.1f} GB"
        )
    return 0 if whole <= have else EXIT_DOES_NOT_FIT
