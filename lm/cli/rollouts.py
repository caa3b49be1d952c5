"""Look at everything that a run sampled, on a page.

  lm rollouts quickstart
  lm rollouts quickstart --stage reason --port 0

The page lists the groups of completions of every step, with filters, search and
the history of one prompt, and shows each completion's tokens, coloured by
log-probability, advantage, importance ratio, clip or KL. It is for this
machine, and reads the Parquet files in RUN/stages/STAGE/trajectories, also
while the run trains."""

from __future__ import annotations

import argparse
import signal

from lm.cli.arguments import RUN_HELP, at_least, check_stage, find_run

TAKES_OVERRIDES = False


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--stage", metavar="NAME", help="the stage to begin with; else the last one with trajectories")
    parser.add_argument(
        "--port", metavar="N", type=at_least(0, 65_535), default=8001, help="port (%(default)s); 0: any free one"
    )


def call(arguments: argparse.Namespace) -> int:
    folder = find_run(arguments.run)

    from lm.changes import read_experiment
    from lm.web.rollout_viewer import serve_rollouts

    check_stage(arguments.stage, [stage["name"] for stage in read_experiment(folder)["stages"]], str(folder))
    server = serve_rollouts(folder, arguments.stage, arguments.port)
    print(f"open http://localhost:{server.server_port}/ (Ctrl-C ends)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt as error:
        print()
        if signal.SIGTERM in error.args:
            raise
    finally:
        server.server_close()
    return 0
