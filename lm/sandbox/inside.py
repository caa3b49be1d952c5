"""What runs inside a jail: limits and the system-call filter are applied, then one program runs.

Stdlib only, since a jail holds nothing else. A jailed process has these open files: 0, 1 and 2, CHANNEL to another jail
(or /dev/null), READY and REQUEST. The request is JSON: `limits`, `mode` (a key of MODES) and the arguments of that function.

Model-written code shares a process with `run_program` or `serve_calls`, so nothing that these report is believed: what they
return is an answer, compared elsewhere. Tests run in a jail of their own (`run_tests`), which calls the model-written code
over CHANNEL.
"""

from __future__ import annotations

import atexit
import builtins
import ctypes
import json
import linecache
import os
import random
import resource
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from lm.sandbox.system_calls import install_filter

CHANNEL, READY, REQUEST = 3, 4, 5
DEEPEST = 50  # levels of nested containers in a value that crosses the channel

DROP_CAPABILITY = 24  # PR_CAPBSET_DROP of <linux/prctl.h>
CAPABILITY_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
OWN_PROCESSES = 3  # processes of the jail itself
OWN_MEMORY = 128 << 20  # address space of an interpreter without a program
OPEN_FILES = 64


def confine(limits: Mapping[str, Any], user: int) -> None:
    """Give up privileges, and apply the limits and the system-call filter to this process and its later children.

    Args:
        user: the user id to change to; 0: stay what this process is.
    """
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    library = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        library.prctl(DROP_CAPABILITY, capability, 0, 0, 0)
    library.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())
    for name, value in (
        ("AS", limits["memory_bytes"] + OWN_MEMORY),
        ("CPU", int(limits["cpu_seconds"]) + 1),
        ("FSIZE", limits["disk_bytes"]),
        ("NOFILE", OPEN_FILES),
        ("NPROC", limits["processes"] + OWN_PROCESSES if limits["processes"] else resource.RLIM_INFINITY),
        ("CORE", 0),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(kind)[1]  # cannot be raised; -1: none
        value = max(value, most) if -1 in (value, most) else min(value, most)
        resource.setrlimit(kind, (value, value))
    install_filter()


def read_request() -> dict[str, Any]:
    """The request, whose file is closed."""
    with open(REQUEST, "rb") as file:
        return json.load(file)


def start(request: Mapping[str, Any]) -> int:
    """Say that the jail is ready, then run the program of a request; its exit status."""
    os.write(READY, b"r")
    os.close(READY)
    os.environ.clear()
    os.environ.update(HOME="/tmp", LANG="C.UTF-8", PATH="/usr/bin:/bin")
    random.seed(0)  # a fork would continue a state that depends on the process
    sys.dont_write_bytecode = True
    status = _status_of(MODES[request["mode"]], request["arguments"])
    # As at the end of any Python program: threads end, then functions of atexit run, then output is written.
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        status = status or 1
    return status & 0xFF


def _status_of(function: Callable[..., None], arguments: Mapping[str, Any]) -> int:
    try:
        function(**arguments)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:  # a program may raise anything
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """The whole process, where a jail starts a new interpreter."""
    request = read_request()
    confine(request["limits"], request["user"])
    os._exit(start(request))


# ---- the modes ---------------------------------------------------------------------------------------------------------


def _execute(code: str, name: str) -> dict[str, Any]:
    """Run code as the module `name`, and return its globals. Its lines appear in tracebacks."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    linecache.cache["<program>"] = (len(code), None, code.splitlines(True), "<program>")
    exec(compile(code, "<program>", "exec"), module.__dict__)
    return module.__dict__


def run_program(code: str) -> None:
    """Run a program with stdin and stdout."""
    _execute(code, "__main__")


def serve_calls(code: str) -> None:
    """Run a program once, then answer the calls of its functions that come over the channel.

    The first answer lists its names and which of them are callable. A value that is no plain data (an instance of a class)
    stays here; the other jail gets a number for it.
    """
    stream = _channel()
    found = _execute(code, "solution")
    _send(stream, {"names": {name: callable(value) for name, value in found.items() if not name.startswith("__")}})
    kept: dict[int, Any] = {}
    for line in stream:
        asked = json.loads(line)
        try:
            value = kept[asked["object"]] if "object" in asked else found[asked["name"]]
            value = getattr(value, asked["attribute"]) if "attribute" in asked else value
            if "arguments" in asked:
                value = value(*decode(asked["arguments"], kept.get), **decode(asked["named"], kept.get))
            _send(stream, {"value": encode(value, kept)})
        except Exception as error:
            _send(stream, {"error": type(error).__name__, "text": str(error)[:1000]})


def run_tests(tests: list[str], setup: str = "", entry_point: str = "") -> None:
    """Run tests against the functions that another jail serves, and print the outcome of each as JSON: "" or what failed.

    A test is Python code; it passes if it raises nothing. Functions `test_*` without parameters, classes of unittest, and
    HumanEval's `check(candidate)` that it defines are called.
    """
    verdict = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what tests print is no verdict
    stream = _channel()
    first = _receive(stream)
    names = {
        name: Remote(stream, {"name": name}) if called else _ask(stream, name=name)
        for name, called in first["names"].items()
        if _may_name(name, entry_point)
    }
    sys.modules["solution"] = types.ModuleType("solution")
    sys.modules["solution"].__dict__.update(names)
    outcomes = []
    for test in tests:
        space = dict(names)
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            exec(compile(setup, "<setup>", "exec"), space)
            exec(compile(test, "<test>", "exec"), space)
            _call_tests(space, entry_point, names)
            outcomes.append("")
        except BaseException as error:  # tests may raise anything
            outcomes.append(f"{type(error).__name__}: {error}"[:200].strip(": ") or "failed")
    json.dump(outcomes, verdict)
    verdict.flush()


MODES: dict[str, Callable[..., None]] = {"program": run_program, "calls": serve_calls, "tests": run_tests}


def _may_name(name: str, entry_point: str) -> bool:
    """Whether a test sees a name of the program: `abs` or `math` of its own could make any test pass."""
    known = hasattr(builtins, name) or name in sys.stdlib_module_names
    return name.isidentifier() and not name.startswith("__") and (name == entry_point or not known)


def _call_tests(space: Mapping[str, Any], entry_point: str, names: Mapping[str, Any]) -> None:
    own = {name: value for name, value in space.items() if value is not names.get(name)}
    if callable(own.get("check")) and entry_point:
        own["check"](space[entry_point])
    case = getattr(sys.modules.get("unittest"), "TestCase", ())
    for name, value in own.items():
        if isinstance(value, types.FunctionType) and name.startswith("test_") and not value.__code__.co_argcount:
            value()
        if isinstance(value, type) and issubclass(value, case):
            unittest = sys.modules["unittest"]
            result = unittest.defaultTestLoader.loadTestsFromTestCase(value).run(unittest.TestResult())
            for _, text in [*result.failures, *result.errors]:
                raise AssertionError(text.strip().rpartition("\n")[2])


# ---- the channel between two jails -----------------------------------------------------------------------------------


def _channel() -> Any:
    return socket.socket(fileno=CHANNEL).makefile("rw", encoding="utf-8", newline="\n")


def _send(stream: Any, message: Any) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def _receive(stream: Any) -> dict[str, Any]:
    line = stream.readline()
    if not line.endswith("\n"):
        raise SystemExit("the program ended")
    return json.loads(line)


def _ask(stream: Any, **asked: Any) -> Any:
    """The value that the other jail gives for a name or a call; its exceptions are raised here."""
    _send(stream, asked)
    found = _receive(stream)
    if "error" in found:
        kind = getattr(builtins, found["error"], None)
        if not isinstance(kind, type) or not issubclass(kind, Exception) or issubclass(kind, UnicodeError):
            kind = RuntimeError
        raise kind(found["text"])
    return decode(found["value"], lambda number: Remote(stream, {"object": number}))


class Remote:
    """A function or an object of the other jail. It equals only itself: an `==` answered there could claim to equal anything."""

    def __init__(self, stream: Any, where: Mapping[str, Any]):
        self._stream, self._where = stream, where

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The result of the call in the other jail."""
        return _ask(self._stream, arguments=encode(arguments), named=encode(named), **self._where)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _ask(self._stream, attribute=name, **self._where)

    def __bool__(self) -> bool:
        raise TypeError("an object of the program is neither true nor false")


CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
SCALARS = (bool, int, float, str)


def encode(value: Any, kept: dict[int, Any] | None = None, depth: int = 0) -> Any:
    """A value as JSON: plain data as it is, containers with their type; other objects as the number under which they are `kept`.

    Iterators become lists, and subclasses of a type of plain data that type.

    Raises:
        TypeError: the value is no plain data and nothing is kept.
    """
    if depth > DEEPEST:
        raise RecursionError(f"a value has more than {DEEPEST} levels")
    if value is None:
        return None
    for scalar in SCALARS:
        if isinstance(value, scalar):
            return scalar(value)
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"dict": [[encode(one, kept, depth + 1) for one in item] for item in value.items()]}
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return {name: [encode(one, kept, depth + 1) for one in value]}
    if isinstance(value, Remote):
        return dict(value._where)
    if isinstance(value, Iterator | range | KeysView | ValuesView | ItemsView):
        return {"list": [encode(one, kept, depth + 1) for one in value]}
    if kept is None:
        raise TypeError(f"a test gives the program a {type(value).__name__}, which is no plain data")
    kept[len(kept)] = value
    return {"object": len(kept) - 1}


def decode(value: Any, found: Callable[[int], Any]) -> Any:
    """The value of `encode`; `found` gives the object of a number."""
    if not isinstance(value, dict):
        return value
    (name, content), *_ = value.items()
    if name == "object":
        return found(content)
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "complex":
        return complex(*content)
    if name == "dict":
        return {decode(key, found): decode(one, found) for key, one in content}
    return CONTAINERS[name](decode(one, found) for one in content)
