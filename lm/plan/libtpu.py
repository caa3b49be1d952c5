"""Which libtpu `lm plan --compile` asks: the one that the installed jax would run on a TPU host, or another on request."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, distributions, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lm.experiment import UserError

LIBRARY = "libtpu.so"
READ = SpecifierSet(">=0.0.42,<0.0.53")
"""The versions whose modules, lists of allocations and errors lm/plan/hlo_text.py and compiled.py have been tried with."""
VARIABLE = "TPU_LIBRARY_PATH"  # by which jax finds it, before the installed package
INSTALL = "pip install 'lm[plan]'"
OTHER = "pip install --no-deps --target DIR libtpu==VERSION"


@dataclass(frozen=True)
class Libtpu:
    """A TPU compiler on this machine."""

    path: Path  # of the library
    version: str | None  # None: nothing beside the library tells
    asked: SpecifierSet  # the versions that the installed jax asks for (its extra `tpu`)

    @property
    def name(self) -> str:
        """For people and for --json: estimates of two versions do not compare."""
        return f"libtpu {self.version}" if self.version else f"libtpu at {self.path}"

    @property
    def notes(self) -> list[str]:
        """Lines for people: where hosts that install jax[tpu] run another one, and where its words may be other ones."""
        lines = []
        if self.version is None or not self.asked.contains(self.version, prereleases=True):
            hosts = f"hosts with jax {version('jax')} run libtpu {self.asked}, whose figures may differ"
            lines.append(f"asked was {self.name}; {hosts}")
        if self.version is None or not READ.contains(self.version, prereleases=True):
            lines.append(f"its text was read as that of libtpu {READ}, the versions that lm has been tried with")
        return lines


def find_libtpu(given: str | None) -> Libtpu:
    """The compiler to ask.

    Args:
        given: a libtpu.so, or a folder into which pip has put the package; None: the one that jax would load.

    Raises:
        UserError: there is none.
    """
    chosen = given if given is not None else os.environ.get(VARIABLE)
    if chosen is not None:
        named = "--libtpu" if given is not None else VARIABLE
        places = [Path(chosen), Path(chosen) / LIBRARY, Path(chosen) / "libtpu" / LIBRARY]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise UserError(f"{named} {chosen!r}: no {LIBRARY}, nor a folder with one, is there ({OTHER} makes one)")
        return Libtpu(path.resolve(), _version_beside(path.resolve()), asked_by_jax())
    spec = importlib.util.find_spec("libtpu")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"--compile needs the TPU compiler, which is not installed: {INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / LIBRARY
    return Libtpu(path, _version_beside(path) or _installed_version(), asked_by_jax())


def asked_by_jax() -> SpecifierSet:
    """The versions of libtpu that the extra `tpu` of the installed jax asks for."""
    for requirement in map(Requirement, requires("jax") or []):
        if requirement.name == "libtpu" and (not requirement.marker or requirement.marker.evaluate({"extra": "tpu"})):
            return requirement.specifier
    return SpecifierSet()


def _version_beside(path: Path) -> str | None:
    """The version of the package that a library belongs to, from the metadata that pip put beside it."""
    found = {item.metadata["Name"]: item.version for item in distributions(path=[str(path.parent.parent)])}
    return found.get("libtpu") if path.parent.name == "libtpu" else None


def _installed_version() -> str | None:
    try:
        return distribution("libtpu").version
    except PackageNotFoundError:
        return None
