"""Serve models over the OpenAI protocol, with a chat page.

Any client of that protocol can use it, with /v1 of the printed address as its
base URL; all models share one process:

  lm serve quickstart                          the model after the last stage
  lm serve quickstart --stage pretrain sft     one model for each stage, by name
  lm serve FOLDER --adapter A --adapter B      one for each adapter, and without

The first model is also called default. Completions are batched as they come:
--slots of them are sampled at once by each model, --queue more wait, and other
requests get the status 429.

The server is for this machine. `--host 0.0.0.0` opens it to others: they need
the token, as `Authorization: Bearer TOKEN`. It is plain HTTP: on a network that
you do not trust, put it behind a proxy with TLS."""

from __future__ import annotations

import argparse
import importlib.util

from lm.cli.arguments import MODEL_HELP, access_token, add_address, add_slots, at_least, find_model, link
from lm.experiment import UserError
from lm.extras import install_command

TAKES_OVERRIDES = False
NEEDS = ("starlette", "uvicorn", "llguidance", "prometheus_client")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=MODEL_HELP)
    parser.add_argument(
        "--stage", metavar="NAME", nargs="+", help="the models after these stages; else after the last one trained"
    )
    parser.add_argument(
        "--adapter", metavar="FOLDER", action="append", default=[],
        help="a PEFT adapter, served beside the model; can be repeated",
    )  # fmt: skip
    add_slots(parser)
    parser.add_argument(
        "--queue", metavar="N", type=at_least(0, 10**6), default=256,
        help="completions that wait for a slot, before requests are refused (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", metavar="S", type=at_least(1, 10**6), default=600, help="seconds for a request (%(default)s)"
    )
    add_address(parser)


def call(arguments: argparse.Namespace) -> int:
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"`lm serve` needs {', '.join(missing)}: {install_command('serve')}")
    found = [find_model(arguments.run, stage) for stage in dict.fromkeys(arguments.stage or [None])]
    token = access_token(arguments.host, arguments.token_file)

    from lm.serve import models
    from lm.serve.app import State, make_app
    from lm.serve.memory import default_slots, memory_of
    from lm.serve.metrics import Metrics
    from lm.serve.scheduler import Scheduler
    from lm.serve.server import EndingServer, bind, run
    from lm.train.compilations import keep_compilations

    with bind(arguments.host, arguments.port) as listener:
        port = listener.getsockname()[1]
        keep_compilations()
        wanted = arguments.slots or default_slots(), arguments.length, arguments.max_new_tokens
        served = models.load_models(found[0][0], [stage for _, stage in found], arguments.adapter, *wanted)
        for one in served.values():
            models.warm_up(one)
        metrics = Metrics()

        def count(name: str, tokens: int) -> None:
            metrics.sampled_tokens.labels(name).inc(tokens)

        scheduler = Scheduler({name: one.engine for name, one in served.items()}, arguments.queue, count)
        metrics.watch(scheduler)
        scheduler.start()
        app = make_app(State(served, scheduler, metrics, arguments.timeout, token, port))
        for one in served.values():
            sizes = one.engine.sizes
            told = memory_of(one.engine.model, sizes)
            print(f"{one.name}: {sizes.slots} slots, a context of {sizes.length} tokens, {told}")
        print(f"open {link(arguments, port, token)} (Ctrl-C ends)", flush=True)
        run(EndingServer(app, scheduler), listener)
        scheduler.stop()
    return 0
