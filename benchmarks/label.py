"""The label page at speed: from a choice to the next pair, at the server, with a thousand pairs on file.

  python benchmarks/label.py [--pairs 1000] [--characters 2000] [--folder DIR]

Two people choose at once over HTTP, each choice synced to the disk of DIR. Prints the percentiles."""

from __future__ import annotations

import argparse
import http.client
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from lm.choices.desk import Desk
from lm.choices.log import open_log
from lm.choices.pairs import make_task
from lm.data.sources import load_rows
from lm.label.server import Server

PARAGRAPH = "Some **words** of an answer, `code` among them, and more of it so that it has a length.\n\n"


def rows(pairs: int, characters: int) -> str:
    text = (PARAGRAPH * (characters // len(PARAGRAPH) + 1))[:characters]
    made = ({"prompt": f"Question {i}?", "answers": [f"{i} {text}", f"{text} {i}"]} for i in range(pairs))
    return "".join(json.dumps(row) + "\n" for row in made)


def person(port: int, name: str, taken: list[float]) -> None:
    """Chooses until nothing is left; adds the milliseconds from each choice to the next pair."""
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def post(action: str, **body: object) -> dict:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"/api/{action}", json.dumps({"name": name, **body}), headers)
        return json.loads(connection.getresponse().read())

    view = post("show")
    while view["pair"] is not None:
        started = time.perf_counter()
        view = post("choose", pair=view["pair"], choice="left", strength=2, comment="")
        taken.append(1000 * (time.perf_counter() - started))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--characters", type=int, default=2000, help="of an answer")
    parser.add_argument("--folder", type=Path, help="on the disk that is written to")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        (folder / "answers.jsonl").write_text(rows(given.pairs, given.characters), "utf-8")
        task = make_task(load_rows(str(folder / "answers.jsonl")))
        with open_log(folder / "labels.jsonl") as log:
            server = Server(Desk(task.pairs, log, per_pair=2))
            serving = threading.Thread(target=server.serve_forever)
            serving.start()
            taken: list[float] = []
            people = [threading.Thread(target=person, args=(server.server_port, n, taken)) for n in ("Ann", "Bob")]
            for one in people:
                one.start()
            for one in people:
                one.join()
            server.shutdown()
            serving.join()
            server.server_close()
    half, most, worst = np.percentile(taken, [50, 99, 100])
    print(
        f"{len(taken)} choices of {given.pairs} pairs: median {half:.1f} ms, 99 % {most:.1f} ms, worst {worst:.1f} ms"
    )


if __name__ == "__main__":
    main()
