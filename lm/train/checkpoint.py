"""Checkpoints of a training state: saved asynchronously by orbax, sealed with checksums, verified on load.

A checkpoint is a folder `STEP/`, which orbax writes under a temporary name and renames when complete. Its
`manifest.json` is written last: the step, the caller's `meta`, the name, dtype and shape of every array, and the
SHA-256 of every file. A folder without a manifest is unfinished and ignored; a folder that disagrees with its manifest
is damaged. So SIGKILL at any moment leaves no partial checkpoint that looks complete, and a flipped bit is detected
before training continues from it.

What no step changes, such as the base of an adapter, is stored once, sealed alike, in `untrained/` beside the steps. The
manifest of a step has the seal of that folder, and the step is intact only together with it.

Arrays are stored by name (`blocks/attn/q`), not by class, so that checkpoints survive a renaming of classes.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.experiment import UserError
from lm.parallel.distributed import broadcast_from_main, is_main_process
from lm.shapes import is_count, is_text, misfit
from lm.stored import SEAL, file_sha256, read_json, sealed, unsealed, write_json_atomic
from lm.train.named_arrays import (
    Named,
    PyTree,
    full_names,
    named_leaves,
    part_of,
    read_arrays,
    rebuild,
    signature,
    write_arrays,
)
from lm.train.run_shapes import CHECKPOINT

MANIFEST = "manifest.json"
UNTRAINED = "untrained"
SHAPE = {"items": {"*": {"*": is_text}}, "files": {"*": is_text}}
SHAPE_OF_STEP = SHAPE | {"step": is_count, "meta": CHECKPOINT}
LAST_WITHOUT_ROLES = "63547b6"
STEP_NAME = re.compile(r"\d{8,}")


@dataclass(frozen=True)
class Restored:
    """A restored checkpoint: arrays in the requested structure and sharding, and the saved `meta`."""

    step: int
    items: dict[str, PyTree]
    meta: dict[str, Any]


class Damaged(Exception):
    """Raised for a damaged checkpoint; names the file and the difference."""


class Checkpoints:
    """The checkpoints in one folder. Every process of a run makes the same calls.

    Args:
        keep: number of newest checkpoints to keep.
        keep_every: checkpoints at multiples of this step are kept permanently; 0: none.
    """

    def __init__(self, folder: Path | str, keep: int = 2, keep_every: int = 0) -> None:
        self.folder = Path(folder).absolute()
        self.keep, self.keep_every = keep, keep_every
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._swept = False
        self._untrained = ""  # the seal of the arrays that no step changes, once this process has seen them

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending, without verification."""
        return [step for step, path in _step_folders(self.folder) if (path / MANIFEST).exists()]

    def save(self, step: int, items: dict[str, PyTree], meta: dict[str, Any], untrained: Collection[str] = ()) -> None:
        """Start an asynchronous save; returns when the arrays may be donated or changed.

        Does nothing if the step already has an intact checkpoint.

        Args:
            untrained: `ITEM/NAME` of arrays that no step changes: written at the first save only.

        Raises:
            UserError: writing fails, now or (for the asynchronous part) in the next `save`, `wait` or `close`.
        """
        self.wait()
        path = self.folder / f"{step:08d}"
        if self._is_intact(path):
            return
        arrays = {item: named_leaves(tree) for item, tree in items.items()}
        fixed = part_of(arrays, lambda name: name in untrained)
        changing = part_of(arrays, lambda name: name not in untrained)
        meta = json.loads(json.dumps(meta))  # a copy, in the types that JSON gives back
        manifest = {"step": step, "meta": meta, "items": {item: signature(named) for item, named in arrays.items()}}
        if fixed:
            manifest[UNTRAINED] = self._save_untrained(fixed)
        with self._guard(path):
            self._clear(path)
            response = write_arrays(path, changing)
        self._pending = self._thread.submit(self._finish, path, manifest, response)

    def wait(self) -> None:
        """Wait until the current save is complete. Raises UserError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the current save and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(
        self,
        abstract: dict[str, PyTree],
        warn: Callable[[str], None] = print,
        only: int | None = None,
        optional: Collection[str] = (),
        skip: bool = True,
    ) -> Restored | None:
        """Restore the newest intact checkpoint, or None if none was ever finished.

        Args:
            abstract: the items to restore, each a pytree of jax.ShapeDtypeStruct; arrays are placed by its sharding
                (without one: on the first device), whatever sharding they were saved from.
            warn: called with one line for every unfinished or damaged checkpoint that is skipped.
            only: restore the checkpoint of this step and no other (the last step of a finished stage).
            optional: items that may be missing from the checkpoint, and then from the result.
            skip: read the checkpoint before a damaged one, from which a run goes on to the same model.

        Raises:
            UserError: checkpoints exist but none is intact, or the one that is to be read is not; names, shapes or dtypes
                differ from `abstract`.
        """
        self.wait()
        step = broadcast_from_main(lambda: self._newest_intact(warn, skip) if only is None else self._check_step(only))
        if step is None:
            return None
        path = self.folder / f"{step:08d}"
        manifest = _read_manifest(path)
        _check_roles(path, abstract, manifest["items"])
        there = [item for item in abstract if item in manifest["items"] or item not in optional]
        wanted = {item: named_leaves(abstract[item]) for item in there}
        for item, named in wanted.items():
            _check_same(path, item, signature(named), manifest["items"])
        apart = self.folder / UNTRAINED
        fixed = full_names(_read_manifest(apart)["items"]) if UNTRAINED in manifest else set()
        try:
            loaded = read_arrays(path, part_of(wanted, lambda name: name not in fixed))
            loaded |= read_arrays(apart, part_of(wanted, lambda name: name in fixed))
        except (KeyError, ValueError, OSError) as error:
            raise UserError(
                f"{path}: its files have not the arrays that its {MANIFEST} lists ({' '.join(str(error).split()):.200}); "
                "put back a copy of the folder, or remove it"
            ) from error
        items = {item: rebuild(item, abstract[item], loaded) for item in there}
        return Restored(manifest["step"], items, manifest["meta"])

    def finish(self, step: int, items: Collection[str]) -> None:
        """Reduce a finished stage to its last and its permanent checkpoints, with only these items.

        Does nothing if the last checkpoint is missing or its manifest is damaged.
        """
        self.wait()
        if not is_main_process() or not any(self.has(step, item) for item in items):
            return
        for other in self.steps():
            path = self.folder / f"{other:08d}"
            if other == step or _is_permanent(other, self.keep_every):
                _drop_items(path, items)
            else:
                _remove(path)
        for name in _unfinished(self.folder):
            _remove(self.folder / name)

    def newest_meta(self) -> dict[str, Any]:
        """`meta` of the newest finished checkpoint, without reading arrays; {} if there is no readable one."""
        try:
            return _read_manifest(self.folder / f"{self.steps()[-1]:08d}")["meta"]
        except (Damaged, IndexError):
            return {}

    def has(self, step: int, item: str) -> bool:
        """Whether the checkpoint of a step exists and has an item."""
        try:
            return item in _read_manifest(self.folder / f"{step:08d}")["items"]
        except Damaged:
            return False

    def fingerprint(self, item: str, step: int | None) -> str:
        """SHA-256 of an item's files at a step (None: the newest), and of what its checkpoint needs besides, by the manifest alone.

        Raises:
            UserError: there is no such checkpoint, or its manifest is damaged.
        """
        step = max(self.steps(), default=0) if step is None else step
        try:
            manifest = _read_manifest(self.folder / f"{step:08d}")
        except Damaged as damage:
            raise UserError(f"{damage}; put back a copy of it") from damage
        files = {name: seal for name, seal in manifest["files"].items() if name.split("/")[0] == item}
        return sealed({"files": files, UNTRAINED: manifest.get(UNTRAINED), "base": manifest["meta"].get("base")})[SEAL]

    def _save_untrained(self, arrays: Named) -> str:
        """Write the arrays that no step changes, unless they are there; returns the seal of their manifest.

        Without a finished checkpoint they are written anew, since a stage that began again may have other ones.
        """
        path = self.folder / UNTRAINED
        items = {item: signature(named) for item, named in arrays.items()}

        def found() -> str:
            try:
                _verify(path)
                manifest = _read_manifest(path)
            except Damaged:
                return ""
            return sealed(manifest)[SEAL] if self.steps() and manifest["items"] == items else ""

        self._untrained = self._untrained or broadcast_from_main(found)
        if not self._untrained:
            with self._guard(path):
                self._clear(path)
                write_arrays(path, arrays).result()
                if is_main_process():
                    write_json_atomic(path / MANIFEST, sealed({"items": items, "files": _checksums(path)}))
            self._untrained = broadcast_from_main(lambda: sealed(_read_manifest(path))[SEAL])
        return self._untrained

    def _finish(self, path: Path, manifest: dict[str, Any], response: Any) -> None:
        """In the background: wait for orbax, write the manifest, remove superseded checkpoints."""
        with self._guard(path):
            response.result()
            if is_main_process():
                write_json_atomic(path / MANIFEST, sealed({**manifest, "files": _checksums(path)}))
                for step in _superseded(self.steps(), manifest["step"], self.keep, self.keep_every):
                    _remove(self.folder / f"{step:08d}")

    def _newest_intact(self, warn: Callable[[str], None], skip: bool) -> int | None:
        for name in _unfinished(self.folder):
            warn(f"{self.folder / name} was not finished when its run stopped: skipped")
        steps = self.steps()
        for step in reversed(steps):
            try:
                _verify(self.folder / f"{step:08d}")
            except Damaged as damage:
                if not skip:
                    remedy = f"put back a copy of it, or remove {self.folder / f'{step:08d}'} to read the checkpoint before it"
                    raise UserError(f"{damage}: this is the newest checkpoint: {remedy}") from damage
                warn(f"{damage}: skipped, trying the checkpoint before it")
                continue
            return step
        if steps:
            found = ", ".join(map(str, steps))
            raise UserError(
                f"{self.folder}: every checkpoint (step {found}) is damaged; put back a copy of the folder, "
                "or remove it, and summary.json beside it if that is there, to train this stage again from its start"
            )
        return None

    def _check_step(self, step: int) -> int:
        path = self.folder / f"{step:08d}"
        again = f"put back a copy of it, or remove {self.folder.parent} and `lm run` trains that stage again"
        if not (path / MANIFEST).exists():
            raise UserError(f"{path}, the last checkpoint of a finished stage, is not there: {again}")
        try:
            _verify(path)
        except Damaged as damage:
            raise UserError(f"{damage}: this is the last checkpoint of a finished stage: {again}") from damage
        return step

    def _is_intact(self, path: Path) -> bool:
        """Whether the checkpoint exists and is intact, as seen by the main process."""

        def check() -> bool:
            try:
                _verify(path)
            except Damaged:
                return False
            return True

        return broadcast_from_main(check)

    def _clear(self, path: Path) -> None:
        """Prepare `path` for writing, and remove unfinished saves of earlier sessions (once)."""
        if not is_main_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        leftovers = [] if self._swept else _unfinished(self.folder)
        self._swept = True
        for name in {*leftovers, path.name}:
            _remove(self.folder / name)

    @contextlib.contextmanager
    def _guard(self, path: Path) -> Iterator[None]:
        """Remove a failed save's files and raise the disk's error in one line."""
        try:
            yield
        except Exception as error:
            if is_main_process():
                for name in _unfinished(self.folder):
                    _remove(self.folder / name)
            reason = _disk_reason(error)
            if reason is None:
                raise
            raise UserError(
                f"{path}: the checkpoint could not be saved: {reason}; earlier ones are untouched: "
                "fix that and run the same command again to resume from there"
            ) from error


def _check_roles(path: Path, wanted: Collection[str], saved: Collection[str]) -> None:
    """Raise UserError for a checkpoint of an older version, which stored the model as `params` and not by its role."""
    if "params" in saved and "params" not in wanted:
        raise UserError(
            f"{path} has its model as 'params', which is {' or '.join(sorted(wanted))} now: commit {LAST_WITHOUT_ROLES} still "
            f"reads it, or remove {path.parents[1]} to train that stage again"
        )


def _check_same(path: Path, item: str, wanted: dict[str, str], saved_items: dict[str, dict[str, str]]) -> None:
    """Raise UserError naming the first array that is missing, differs, or is left over."""
    if item not in saved_items:
        raise UserError(f"{path} has no {item!r}; it has {', '.join(sorted(saved_items))}")
    saved = saved_items[item]
    misfit = f"{path}: {item} does not fit this experiment:"
    for name, kind in wanted.items():
        if name not in saved:
            near = difflib.get_close_matches(name, saved, n=1)
            hint = f"; the nearest name there is {near[0]!r}" if near else ""
            raise UserError(f"{misfit} it has no {name!r}{hint}")
        if saved[name] != kind:
            raise UserError(f"{misfit} its {name} is {saved[name]}, not {kind}")
    left_over = [name for name in saved if name not in wanted]
    if left_over:
        raise UserError(f"{misfit} its {left_over[0]!r} has no place here")


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    return sorted((int(path.name), path) for path in folder.iterdir() if STEP_NAME.fullmatch(path.name))


def _unfinished(folder: Path) -> list[str]:
    """Names of unfinished saves: orbax's temporary folders, and steps without a manifest."""
    steps = [path.name for _, path in _step_folders(folder) if not (path / MANIFEST).exists()]
    return steps + sorted(path.name for path in folder.glob("*.orbax-checkpoint-tmp*"))


def _superseded(steps: list[int], saved: int, keep: int, keep_every: int = 0) -> list[int]:
    """Steps to remove after `saved`: all but the `keep` newest up to it, and later ones that a rewind left behind."""
    before = [step for step in steps if step <= saved]
    kept = {*before[-keep:], *(step for step in before if _is_permanent(step, keep_every))}
    return [step for step in steps if step not in kept]


def _is_permanent(step: int, keep_every: int) -> bool:
    return keep_every > 0 and step % keep_every == 0


def _drop_items(path: Path, items: Collection[str]) -> None:
    """Reduce a checkpoint to these items; rewrites the manifest first, so that a kill never leaves a damaged one."""
    try:
        manifest = _read_manifest(path)
    except Damaged:
        return
    kept = {name: value for name, value in manifest["items"].items() if name in items}
    dropped = manifest["items"].keys() - kept.keys()
    if dropped:
        files = {name: seal for name, seal in manifest["files"].items() if name.split("/")[0] not in dropped}
        write_json_atomic(path / MANIFEST, sealed({**manifest, "items": kept, "files": files}))
    for part in path.iterdir():  # including items that a kill left half removed
        if part.is_dir() and part.name not in kept:
            shutil.rmtree(part)


def _checksums(path: Path) -> dict[str, str]:
    """SHA-256 of every file below `path` except the manifest, by relative name."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file != path / MANIFEST)
    return {file.relative_to(path).as_posix(): file_sha256(file) for file in files}


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest. Raises Damaged unless it matches its own checksum."""
    try:
        content = read_json(path / MANIFEST)
    except UserError as error:
        raise Damaged(str(error)) from error
    found = unsealed(content) if isinstance(content, dict) else None
    if found is None:
        raise Damaged(f"{path / MANIFEST} does not match its own checksum")
    if fault := misfit(found, SHAPE if path.name == UNTRAINED else SHAPE_OF_STEP):
        raise Damaged(f"{path / MANIFEST} is none of a checkpoint: its {fault:.80} cannot be read")
    if found.get("step", 0) != int(path.name if path.name != UNTRAINED else 0):
        raise Damaged(f"{path / MANIFEST} is that of step {found['step']}")
    return found


def _verify(path: Path) -> None:
    """Raise Damaged naming the first file that is missing, unreadable or changed, of the untrained arrays too."""
    manifest = _read_manifest(path)
    if UNTRAINED in manifest:
        apart = path.parent / UNTRAINED
        if sealed(_read_manifest(apart))[SEAL] != manifest[UNTRAINED]:
            raise Damaged(f"{apart} is not what {path} was saved with")
        _verify(apart)
    for name, checksum in manifest["files"].items():
        try:
            found = file_sha256(path / name)
        except OSError as error:
            raise Damaged(f"{path / name} cannot be read ({error.strerror})") from error
        if found != checksum:
            raise Damaged(f"{path / name} does not match its checksum")


def _remove(path: Path) -> None:
    """Remove a checkpoint, its manifest first, so that no partial one counts. Retries while a failed save still writes."""
    (path / MANIFEST).unlink(missing_ok=True)
    for _ in range(20):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.05)
    raise UserError(f"{path} could not be removed: check its owner and permissions, and remove it by hand")


def _disk_reason(error: BaseException | None) -> str | None:
    """The operating system's error text of an exception or its causes; None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code:
            return os.strerror(int(code.group(1)))
        error = error.__cause__ or error.__context__
    return None
