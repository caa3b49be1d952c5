"""Real processes on this machine that are one run: they meet on localhost and talk over gloo."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEVICES = 4  # in all, whatever the number of processes
# What gloo tells of its connections comes in pieces: threads that write at once part each other's lines anywhere.
GLOO = re.compile(r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :")
PATIENCE = 600  # seconds until a hanging process fails its test


@dataclass
class Processes:
    """The processes of one command, and what each wrote on both streams."""

    running: list[subprocess.Popen]
    logs: list[Path]

    def wait(self) -> list[int]:
        """Their exit codes."""
        return [process.wait(PATIENCE) for process in self.running]

    def said(self, process: int) -> str:
        """What a process wrote, less empty lines and what gloo tells of its connections."""
        lines = self.logs[process].read_text().splitlines(keepends=True)
        return "".join(line for line in lines if not only_gloo(line))


def only_gloo(line: str) -> bool:
    """Whether nothing of a line, or of its part, is anybody's but gloo's: its words, and its numbers."""
    return re.fullmatch(r"[\d\s]*", GLOO.sub("", line)) is not None


@contextlib.contextmanager
def start(folder: Path, count: int, *words: str, own: dict[int, tuple[str, ...]] | None = None) -> Iterator[Processes]:
    """`python WORDS` in `count` processes in `folder`, with `own[i]` added for process i; none outlives the block."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = Processes([], [])
    for i in range(count):
        environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": str(DEVICES // count),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        if count > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(i),
            }
        found.logs.append(folder / f"{port}.{i}.log")
        with found.logs[-1].open("w") as log:
            arguments = [sys.executable, *words, *(own or {}).get(i, ())]
            found.running.append(
                subprocess.Popen(arguments, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        yield found
    finally:
        for process in found.running:
            process.kill()
            process.wait()


def run(
    folder: Path, count: int, *words: str, own: dict[int, tuple[str, ...]] | None = None, code: int = 0
) -> Processes:
    """The same, until all have ended with `code`."""
    with start(folder, count, *words, own=own) as processes:
        codes = processes.wait()
    assert codes == [code] * count, "\n".join(processes.said(i)[-3000:] for i in range(count))
    return processes
