"""Rewards at speed: programs in jails a minute, and answers judged while some of their verifiers hang.

  python benchmarks/judging.py programs [--count 200]     # the sandbox
  python benchmarks/judging.py answers [--count 10000]    # 1 % of the verifiers never end

`programs` prints the programs a minute and the CPU seconds of one with all of its processes, which other work of the machine moves less.
`answers` checks that every answer has its reward, and that exactly those that hang are counted as late.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import struct
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from lm.sandbox import warden
from lm.sandbox.jail import Jail, JailLimits, JailProgram, find_jail, program

PROGRAM = "a, b = map(int, input().split())\nprint(sum(x * x for x in range(a, b)))"
VERIFIER = """
def judged(row, completion):
    while row["hangs"]:
        pass
    return float(completion == row["answer"])
"""


def cpu_seconds(jail: Jail, what: JailProgram) -> float:
    """CPU seconds of one program with its jail and its supervisor, which is forked here, since the jails' own process waits for none."""
    request = {"kind": jail.kind, "bubblewrap": shutil.which("bwrap"), "limits": asdict(JailLimits())} | asdict(what)
    body = json.dumps(request).encode()
    ours, theirs = socket.socketpair()
    supervisor = os.fork()
    if supervisor == 0:
        ours.close()
        warden._supervise(theirs.detach(), os.open(os.devnull, os.O_RDWR))
    theirs.close()
    with ours:
        ours.sendall(struct.pack("<Q", len(body)) + body)
        while ours.recv(1 << 16):
            pass
    return sum(os.wait4(supervisor, 0)[2][:2])


def programs(count: int) -> None:
    jail = find_jail()
    jail.run(program("print(1)"))
    began = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        outcomes = list(threads.map(lambda n: jail.run(program(PROGRAM, f"{n} {n + 100}")), range(count)))
    seconds = time.perf_counter() - began
    expected = [sum(x * x for x in range(n, n + 100)) for n in range(count)]
    assert [int(outcome.stdout) for outcome in outcomes] == expected
    cpu = statistics.median(cpu_seconds(jail, program(PROGRAM, "1 100")) for _ in range(21))
    print(f"{count} programs, {jail.about}: {60 * count / seconds:,.0f} a minute, {1000 * cpu:.0f} ms of CPU time each")


def answers(count: int, limit: float) -> None:
    from lm.rollout.rewards import compute_rewards  # imports jax, which a fork of `programs` should not carry

    rows = [{"answer": str(n), "hangs": n % 100 == 99} for n in range(count)]
    completions = [str(n if n % 2 else -1) for n in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "verifier.py")
        file.write_text(VERIFIER)
        began = time.perf_counter()
        found = compute_rewards(f"{file}:judged", rows, completions, "benchmark", limit)
    seconds = time.perf_counter() - began
    expected = [float(n % 2 == 1 and n % 100 != 99) for n in range(count)]
    assert found.values.tolist() == expected and found.late.tolist() == [row["hangs"] for row in rows]
    late = found.timeouts
    print(
        f"{count:,} answers in {seconds:.0f} s, {late} late at {limit:g} s, none lost; {seconds / max(1, late):.2f} s a late one"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["programs", "answers"])
    parser.add_argument("--count", type=int, default=0, help="default 200 programs, 10,000 answers")
    parser.add_argument("--limit", type=float, default=0.5, help="seconds of a verifier for one answer")
    given = parser.parse_args()
    if given.what == "programs":
        programs(given.count or 200)
    else:
        answers(given.count or 10_000, given.limit)


if __name__ == "__main__":
    main()
