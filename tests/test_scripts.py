"""Which extra the scripts install for a machine's accelerator, and that the Dockerfile's steps are about files that there are."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.test_extras import pins, project

ROOT = Path(__file__).resolve().parent.parent
TPU, GPU, NETWORK = ("0x1ae0", "0x0063", "0x120000"), ("0x10de", "0x2330", "0x030200"), ("0x1ae0", "0x0042", "0x020000")


def extra(
    folder: Path, devices=(), driver: str | None = None, machine: str = "Linux x86_64", **environment
) -> tuple[str, str]:
    """What `accelerator_extra` prints, and says, on a machine with these PCI devices and this version of NVIDIA's driver."""
    programs = folder / "programs"
    programs.mkdir()
    for i, device in enumerate(devices):
        place = folder / "sys/bus/pci/devices" / f"0000:00:0{i}.0"
        place.mkdir(parents=True)
        for name, value in zip(("vendor", "device", "class"), device, strict=True):
            (place / name).write_text(f"{value}\n")
    said = f"echo '{driver}'" if driver is not None else "echo 'NVIDIA-SMI has failed'; exit 9"
    for name, text in {"nvidia-smi": said, "uname": f"echo '{machine}'"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    variables = {"PATH": f"{programs}:{os.environ['PATH']}", "ACCELERATOR_ROOT": str(folder)} | environment
    script = "set -euo pipefail; source scripts/environment.sh; accelerator_extra"
    done = subprocess.run(["bash", "-c", script], env=variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip()


@pytest.mark.parametrize("given, wanted, told", [
    ({}, "", ""),
    ({"devices": [NETWORK]}, "", ""),  # of Google, as TPUs are
    ({"devices": [NETWORK, TPU]}, "tpu", ""),
    ({"devices": [GPU], "driver": "580.65.06"}, "cuda", ""),
    ({"driver": "590.1"}, "cuda", ""),  # in a container that shows no PCI devices
    ({"devices": [GPU], "driver": "535.183.01"}, "", "driver is 535.183.01, and CUDA 13 needs 580"),
    ({"devices": [GPU]}, "", "without a driver that works (nvidia-smi)"),
    ({"devices": [GPU], "driver": "580.1", "machine": "Linux aarch64"}, "", "not Linux aarch64"),
    ({"devices": [TPU], "machine": "Linux aarch64"}, "", "not Linux aarch64"),
    ({"devices": [GPU, TPU], "driver": "580.1", "JAX_PLATFORMS": "cpu"}, "", ""),  # the user wants none
])  # fmt: skip
def test_the_extra_follows_the_accelerator(tmp_path, given, wanted, told):
    found, said = extra(tmp_path, **given)
    assert found == wanted
    assert told in said and len(said.splitlines()) == (1 if told else 0)


@pytest.mark.parametrize("script, base", [("quickstart.sh", ""), ("test.sh", "dev")])
def test_the_scripts_ask_for_it(script, base):
    text = (ROOT / "scripts" / script).read_text("utf-8")
    assert "$(accelerator_extra)" in text and re.search(rf'^prepare "{base}\$', text, re.MULTILINE)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, comments left out and continued lines joined."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ").splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def test_the_dockerfile_is_made_of_known_instructions_in_order():
    names = [name for name, _ in instructions()]
    assert set(names) <= {"FROM", "ARG", "SHELL", "RUN", "WORKDIR", "COPY", "CMD"}
    assert names[0] == "FROM" and names.count("CMD") == 1 and names[-1] == "CMD"
    image = instructions()[0][1]
    assert re.fullmatch(r"python:3\.11-slim-[a-z]+", image), (
        "the Python that constraints.txt is locked for, of a named release"
    )


def test_the_dockerfile_copies_what_there_is_and_the_ignore_file_lets_it_pass():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    copied = [word for name, words in instructions() if name == "COPY" for word in shlex.split(words)[:-1]]
    assert set(copied) == allowed
    assert all((ROOT / word).exists() for word in copied)
    needed = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "lm", "experiments"}
    assert set(copied) == needed


def test_the_dockerfile_installs_an_extra_of_the_project_in_the_locked_versions():
    arguments = dict(words.split("=") for name, words in instructions() if name == "ARG")
    assert arguments == {"EXTRA": "tpu"}
    runs = [words for name, words in instructions() if name == "RUN"]
    (install,) = [words for words in runs if "pip install" in words]
    assert "-c constraints.txt" in install and '".[$EXTRA]"' in install and "--no-cache-dir" in install
    (check,) = [words for words in runs if "EXTRA is" in words]
    for value, code in {"tpu": 0, "cuda": 0, "dev": 1, "": 1}.items():
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", check], env={"EXTRA": value}, capture_output=True)
        assert done.returncode == code
        assert value not in ("tpu", "cuda") or any(f'extra == "{value}"' in line for line in project())
    assert {"jax", "libtpu", "jax-cuda13-plugin"} <= set(pins())
