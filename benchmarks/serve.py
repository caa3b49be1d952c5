"""The server under load: streams of many clients at once, compared with each request alone and with the engine offline.

    python benchmarks/serve.py MODEL [--streams 64] [--seconds 60] [--slots 64] [--new 64]

Starts `lm serve MODEL` on a free port of this machine, and asks it greedy completions:

- alone: each prompt by itself, whose text every stream of the load must give again;
- load: so many streams at once for so many seconds; streams that are lost, doubled or mixed are counted, and tokens per second
  by wall clock and by the server's processor time;
- first token: of a short prompt while 32 other streams run, in steps of the engine;
- gone: the seconds until a client that disconnects has freed its slot;
- offline: tokens per second of `LocalEngine` on the same prompts, in a process of its own, with as many slots.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "serve.json"
OTHERS = 32  # streams beside the first token that is measured
PROMPTS = (
    "Once upon a time", "The little dog", "One day, a girl named Lily", "In the morning", "There was a big tree",
    "Tom and his friend went to the park", "It was raining and", "The sun was",
)  # fmt: skip


async def events(port: int, **asked: Any) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream of completions."""
    body = json.dumps({"model": "default", "temperature": 0, "stream": True, **asked}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        async for line in reader:
            if line.startswith(b"data: {"):
                found = json.loads(line[6:])
                assert "error" not in found, found
                yield found
            elif line.startswith(b"data: [DONE]"):
                return
        raise AssertionError("the stream ended before its end")
    finally:
        writer.close()


async def whole(port: int, **asked: Any) -> tuple[str, int, list[str]]:
    """The text, number of tokens and finish reasons of a stream."""
    text, tokens, ends = "", 0, []
    async for one in events(port, stream_options={"include_usage": True}, **asked):
        tokens = one.get("usage", {}).get("completion_tokens", tokens)
        for choice in one["choices"]:
            text += choice["text"]
            ends += [choice["finish_reason"]] * (choice["finish_reason"] is not None)
    return text, tokens, ends


async def load(port: int, streams: int, seconds: float, new: int, alone: dict[str, str]) -> dict[str, Any]:
    """Streams at once, each client with one after the other."""
    began = time.monotonic()
    counts = {"completions": 0, "tokens": 0, "lost": 0, "doubled": 0, "mixed": 0}

    async def client(number: int) -> None:
        while time.monotonic() < began + seconds:
            prompt = PROMPTS[number % len(PROMPTS)]
            number += 1
            try:
                text, tokens, ends = await whole(port, prompt=prompt, max_tokens=new)
            except (AssertionError, OSError):
                counts["lost"] += 1
                continue
            counts["completions"] += 1
            counts["tokens"] += tokens
            counts["doubled"] += len(ends) != 1
            counts["mixed"] += text != alone[prompt]

    await asyncio.gather(*map(client, range(streams)))
    return counts | {"tokens_per_s": round(counts["tokens"] / (time.monotonic() - began), 1)}


async def first_token(port: int, rounds: int, new: int) -> dict[str, Any]:
    """Steps of the engine, and seconds, from a short request to its first token, while OTHERS streams run."""
    stop = False

    async def other(number: int) -> None:
        while not stop:
            async for _ in events(port, prompt=PROMPTS[number % len(PROMPTS)], max_tokens=new, temperature=1):
                if stop:
                    return

    others = [asyncio.ensure_future(other(number)) for number in range(OTHERS)]
    steps, waits = [], []
    while await metric(port, "lm_running") < OTHERS:
        await asyncio.sleep(0.05)
        for ended in filter(asyncio.Future.done, others):
            ended.result()  # what the server refused would be waited for without an end
    while len(steps) < rounds:
        await asyncio.sleep(0.2)
        began, before = time.monotonic(), await first_steps(port)
        await whole(port, prompt="Once", max_tokens=1)
        waits.append(time.monotonic() - began)
        count, total = (now - then for now, then in zip(await first_steps(port), before, strict=True))
        if count == 1:  # otherwise another stream has begun in the meantime
            steps.append(total)
    stop = True
    await asyncio.gather(*others)
    return {
        "steps_median": statistics.median(steps),
        "steps_most": max(steps),
        "ms": round(1e3 * statistics.median(waits)),
    }


async def first_steps(port: int) -> tuple[float, float]:
    """Number of requests that have had a first token, and the sum of their steps to it."""
    return await metric(port, "lm_first_token_steps_count"), await metric(port, "lm_first_token_steps_sum")


async def gone(port: int, new: int) -> float:
    """Seconds until a client that disconnects has freed its slot."""
    async for _ in events(port, prompt="Once", max_tokens=new, temperature=1):
        break
    began = time.monotonic()
    while await metric(port, "lm_running"):
        await asyncio.sleep(0.02)
    return round(time.monotonic() - began, 2)


async def metric(port: int, name: str) -> float:
    """The sum of a metric over its labels."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)", text, re.MULTILINE))


def memory(pid: int) -> float:
    """The largest memory of a process so far, in GB."""
    line = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return round(int(line[1]) * 1024 / 1e9, 2) if line else 0.0


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def ask_all(port: int, pid: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements of a running server."""
    alone = {prompt: (await whole(port, prompt=prompt, max_tokens=arguments.new))[0] for prompt in PROMPTS}
    before = cpu_seconds(pid)
    found = await load(port, arguments.streams, arguments.seconds, arguments.new, alone)
    return found | {
        "tokens_per_cpu_s": round(found["tokens"] / (cpu_seconds(pid) - before), 1),
        "first_token": await first_token(port, 20, arguments.longest),
        "gone_s": await gone(port, arguments.longest),
    }


def served(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the server, measure it, end it."""
    words = ["serve", arguments.model, "--port", "0", "--slots", str(arguments.slots), *arguments.options]
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "lm.cli.main", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        line = next(line for line in process.stdout if line.startswith("open "))
        port = int(line.split(":")[2].split("/")[0])
        asyncio.run(whole(port, prompt="Once", max_tokens=1))
        start = round(time.monotonic() - began, 1)
        found = asyncio.run(ask_all(port, process.pid, arguments))
        return {"start_s": start, **found, "memory_gb": memory(process.pid)}
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def offline(arguments: argparse.Namespace) -> None:
    """Print the tokens per second of the engine on the same prompts."""
    import jax

    from lm.rollout.engine import LocalEngine, Request
    from lm.rollout.sampler import encode_prompt
    from lm.trained_model import load as load_model

    loaded = load_model(arguments.model).loaded
    prompts = [encode_prompt(loaded.tokenizer, one, raw=True) for one in PROMPTS]
    many = [prompts[number % len(prompts)] for number in range(arguments.offline)]
    engine = LocalEngine(loaded.model, loaded.tokenizer, slots=arguments.slots)
    rates = []
    for _ in range(4):
        wall, cpu = time.monotonic(), time.process_time()
        found = engine.complete(Request(many, jax.random.key(0), arguments.new, 0.0))
        tokens = sum(len(one.tokens) for one in found)
        rates.append((tokens / (time.monotonic() - wall), tokens / (time.process_time() - cpu)))
    print(json.dumps([round(max(some), 1) for some in zip(*rates[1:], strict=True)]))  # the first compiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--longest", type=int, default=128, help="tokens of the streams beside a first token")
    parser.add_argument("--offline", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--options", nargs="*", default=[], help="further words of lm serve, such as length=512")
    arguments = parser.parse_args()
    arguments.options = [word for one in arguments.options for word in (f"--{one.split('=')[0]}", one.split("=")[1])]
    if arguments.slots <= OTHERS:
        parser.error(
            f"--slots should be more than {OTHERS}: so many streams run beside the first token that is measured"
        )
    if arguments.offline:
        offline(arguments)
        return
    found = served(arguments)
    words = [arguments.model, "--slots", str(arguments.slots), "--new", str(arguments.new)]
    many = str(max(arguments.slots, found["completions"] // 4))
    told = subprocess.run(
        [sys.executable, __file__, *words, "--offline", many],
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found["offline_tokens_per_s"], found["offline_tokens_per_cpu_s"] = json.loads(told)
    for kind in ("s", "cpu_s"):
        found[f"ratio_{kind}"] = round(found[f"tokens_per_{kind}"] / found[f"offline_tokens_per_{kind}"], 2)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    name = f"{Path(arguments.model).name}, {arguments.streams} streams, {arguments.slots} slots, {arguments.new} tokens"
    RESULTS.write_text(json.dumps(kept | {name: found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
