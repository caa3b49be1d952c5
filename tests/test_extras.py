"""Every extra of pyproject.toml, and every pair of them, fits the versions of constraints.txt: by metadata, nothing is downloaded."""

import functools
import itertools
import os
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = tuple("tpu cuda plan gguf gym bench serve tensorboard wandb trackio mlflow docs dev".split())
# With one version of each package, what extras need together is what each of them needs.
COMBINATIONS = [(), *itertools.combinations(EXTRAS, 1), *itertools.combinations(EXTRAS, 2), EXTRAS]
# Of packages that a machine without a GPU does not have installed: what version 0.10.2 of the plugin asks for.
NOT_INSTALLED = {
    "jax-cuda13-plugin": [
        "jax-cuda13-pjrt==0.10.2",
        *(
            f'{name}; extra == "with-cuda"'
            for name in (
                "nvidia-cublas>=13.0.0.19", "nvidia-cuda-cupti>=13.0.48", "nvidia-cuda-nvcc>=13.0.48", "nvidia-cuda-runtime>=13.0.48",
                "nvidia-cudnn-cu13<10.0,>=9.12.0.46", "nvidia-cufft>=12.0.0.15", "nvidia-cusolver>=12.0.3.29",
                "nvidia-cusparse>=12.6.2.49", "nvidia-nccl-cu13>=2.27.7", "nvidia-nvjitlink>=13.0.39",
                "nvidia-cuda-nvrtc>=13.0.48", "nvidia-nvshmem-cu13>=3.3.20", "nvidia-nvvm",
            )
        ),
    ],
}  # fmt: skip


def pins() -> dict[str, str]:
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines())
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def project() -> list[str]:
    """What the package asks for, as its metadata will have it."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = list(table["dependencies"])
    for extra, wanted in table["optional-dependencies"].items():
        for requirement in map(Requirement, wanted):
            known = f"({requirement.marker}) and " if requirement.marker else ""
            requirement.marker = None
            lines.append(f'{requirement}; {known}extra == "{extra}"')
    return lines


@functools.cache
def asked_by(name: str) -> tuple[Requirement, ...]:
    """The requirements of a package, by the metadata of what is installed."""
    if name == "lm":
        return tuple(map(Requirement, project()))
    try:
        return tuple(map(Requirement, requires(name) or []))
    except PackageNotFoundError:
        return tuple(map(Requirement, NOT_INSTALLED.get(name, [])))


def unfit(extras: tuple[str, ...], python: str, pinned: dict[str, str]) -> list[str]:
    """What `pip install -c constraints.txt '.[EXTRAS]'` could not install, followed through everything that is needed."""
    environment = default_environment() | LINUX | {"python_version": python, "python_full_version": f"{python}.5"}
    problems, seen, waiting = [], set(), [("lm", frozenset(extras))]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        for requirement in asked_by(name):
            if requirement.marker and not any(
                requirement.marker.evaluate(environment | {"extra": extra}) for extra in ("", *wanted)
            ):
                continue
            needed = canonicalize_name(requirement.name)
            if needed not in pinned and needed != "lm":
                problems.append(f"{name} needs {requirement}: no version of it in constraints.txt")
            elif needed != "lm" and not requirement.specifier.contains(pinned[needed], prereleases=True):
                problems.append(f"{name} needs {requirement}: constraints.txt has {pinned[needed]}")
            waiting.append((needed, frozenset(requirement.extras)))
    return problems


@pytest.mark.parametrize("extras", COMBINATIONS, ids=lambda names: "+".join(names) or "none")
def test_the_extras_fit_the_constraints(extras):
    assert [problem for python in PYTHONS for problem in unfit(extras, python, pins())] == []


@pytest.mark.parametrize("extra", ["tpu", "plan", "dev"])
def test_another_tpu_compiler_than_the_one_of_this_jax_would_be_found(extra):
    (problem, *_) = unfit((extra,), "3.11", pins() | {"libtpu": "0.0.52"})
    assert problem.startswith("jax needs libtpu==0.0.42.*") and problem.endswith("constraints.txt has 0.0.52")


def test_a_package_that_has_no_version_would_be_found():
    without = {name: version for name, version in pins().items() if name != "nvidia-cublas"}
    assert any("nvidia-cublas" in problem for problem in unfit(("cuda", "dev"), "3.11", without))


def test_all_extras_of_the_project_are_tried():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert set(table) == set(EXTRAS)
    assert "[tpu,cuda,plan,docs,dev]" in (ROOT / "scripts" / "lock.sh").read_text("utf-8"), "the lock covers them all"
    assert os.access(ROOT / "scripts" / "lock.sh", os.X_OK)
