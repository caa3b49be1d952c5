"""Finds the libtpu that `lm plan --compile` uses: the one that the installed jax would load, or one given by path."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, distributions, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lm.experiment import UserError
from lm.extras import install_command

LIBRARY = "libtpu.so"
VARIABLE = "TPU_LIBRARY_PATH"  # environment variable that jax prefers to the installed package
OTHER = "pip install --no-deps --target DIR libtpu==VERSION"


@dataclass(frozen=True)
class Libtpu:
    """A TPU compiler on this machine."""

    path: Path  # path of the library
    version: str | None  # None: unknown
    asked: SpecifierSet  # the versions that the installed jax requires (its extra `tpu`)

    @property
    def name(self) -> str:
        """Name and version for output, since estimates of different versions are not comparable."""
        return f"libtpu {self.version}" if self.version else f"libtpu at {self.path}"

    @property
    def notes(self) -> list[str]:
        """A warning if TPU hosts with this jax run another version."""
        if self.version is not None and self.asked.contains(self.version, prereleases=True):
            return []
        hosts = f"hosts with jax {version('jax')} run libtpu {self.asked}, whose figures may differ"
        return [f"compiled with {self.name}; {hosts}"]


def find_libtpu(given: str | None) -> Libtpu:
    """Find the TPU compiler.

    Args:
        given: path of a libtpu.so, or of a folder into which pip installed the package; None: the one jax would load.

    Raises:
        UserError: there is none.
    """
    chosen = given if given is not None else os.environ.get(VARIABLE)
    if chosen is not None:
        named = "--libtpu" if given is not None else VARIABLE
        places = [Path(chosen), Path(chosen) / LIBRARY, Path(chosen) / "libtpu" / LIBRARY]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise UserError(f"{named} {chosen!r} is neither a {LIBRARY} nor a folder with one ({OTHER} makes one)")
        return Libtpu(path.resolve(), _version_beside(path.resolve()), required_by_jax())
    spec = importlib.util.find_spec("libtpu")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"--compile needs the TPU compiler, which is not installed: {install_command('plan')}")
    path = Path(spec.submodule_search_locations[0]) / LIBRARY
    return Libtpu(path, _version_beside(path) or _installed_version(), required_by_jax())


def required_by_jax() -> SpecifierSet:
    """The libtpu versions that the extra `tpu` of the installed jax requires."""
    for requirement in map(Requirement, requires("jax") or []):
        if requirement.name == "libtpu" and (not requirement.marker or requirement.marker.evaluate({"extra": "tpu"})):
            return requirement.specifier
    return SpecifierSet()


def _version_beside(path: Path) -> str | None:
    """The version of a library's package, from pip's metadata beside it; None if there is none."""
    found = {item.metadata["Name"]: item.version for item in distributions(path=[str(path.parent.parent)])}
    return found.get("libtpu") if path.parent.name == "libtpu" else None


def _installed_version() -> str | None:
    try:
        return distribution("libtpu").version
    except PackageNotFoundError:
        return None
