"""Orbax checkpoints of a training run: asynchronous, exact, and clear about what does not fit.

A checkpoint holds the state of the run, typed JAX keys included, and a seal: what the run was set
up with, the shape and dtype of every array, and the size and checksum of every file. The seal is
written before the checkpoint counts as one. So a file that was cut short, lost or altered
afterwards is noticed before anything is read (Orbax itself returns altered numbers without a word),
and the checkpoint before is used; and a run that differs from that of the checkpoint is told in
what.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

SEAL = "seal.json"


class Checkpoints:
    """The checkpoints of one run, in a folder that all its processes share; a context manager.

    Args:
        folder: where they lie, or are to lie; a path, or an address such as ``gs://...``.
        template: the state's shapes with their shardings, which may be others than at the time of
            the checkpoint.
        setting: what must be the same for the run to go on, of JSON's types.
        keep: how many checkpoints to keep, the latest ones.
    """

    def __init__(self, folder: Any, template: Any, setting: Mapping[str, Any], keep: int = 3):
        """Opens the folder and clears away what was never finished there."""
        self._folder = epath.Path(folder).resolve()
        self._template = template
        self._contents = {"setting": dict(setting), "arrays": describe(template)}
        handler, registry = (
            SealingHandler(self._contents),
            ocp.handlers.DefaultCheckpointHandlerRegistry(),
        )
        for arguments in (ocp.args.StandardSave, ocp.args.StandardRestore):
            registry.add("state", arguments, handler)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
            handler_registry=registry,
        )

    def __enter__(self) -> Checkpoints:
        """Returns itself."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Waits for a checkpoint that is being written."""
        self._manager.close()

    def save(self, step: int, state: Any) -> None:
        """Starts to write a checkpoint; the state may be donated as soon as this returns."""
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))

    def restore(self) -> tuple[int, Any] | None:
        """Returns step and state of the latest checkpoint that is whole, None if there is none.

        Damaged ones are told of and removed, as the run will come to their steps again.

        Raises:
            ValueError: if that checkpoint is of another run, or all checkpoints are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            return None
        # One process reads the files, so that all agree even if their views of storage do not.
        sound, faults = self._latest_sound(steps) if jax.process_index() == 0 else (-1, [])
        for fault in faults:
            print(f"warning: {fault}", flush=True)
        sound = int(multihost_utils.broadcast_one_to_all(np.int32(sound)))
        if sound < 0:
            raise ValueError(
                f"every checkpoint in {self._folder} is damaged. Name another folder, or move this "
                "one away to start anew."
            )
        for step in steps[: steps.index(sound)]:
            self._manager.delete(step)
        found = json.loads(self._seal_of(sound).read_text())
        if differences := list(compare(found, self._contents)):
            raise ValueError(
                f"the checkpoint {self._manager.directory / str(sound)} is of another run: "
                f"{'; '.join(differences)}. Give the options of that run, or another folder."
            )
        template = ocp.args.Composite(state=ocp.args.StandardRestore(self._template))
        return sound, self._manager.restore(sound, args=template).state

    def _latest_sound(self, steps):
        faults = []
        for step in steps:
            if not (fault := damage(self._seal_of(step))):
                return step, faults
            faults.append(f"the checkpoint of step {step} is damaged and not used: {fault}.")
        return -1, faults

    def _seal_of(self, step):
        return self._folder / str(step) / "state" / SEAL


class SealingHandler(ocp.StandardCheckpointHandler):
    """Writes a seal into a checkpoint, with the files' sizes and checksums and ``contents``."""

    def __init__(self, contents: Mapping[str, Any]):
        """Takes what the seal holds beside the files."""
        super().__init__()
        self._contents = contents

    def finalize(self, directory: epath.Path) -> None:
        """Called by one process, once all have written and before the checkpoint counts."""
        super().finalize(directory)
        names = [str(path.relative_to(directory)) for path in _files(directory)]
        files = {name: _size_and_checksum(directory / name) for name in names}
        (directory / SEAL).write_text(json.dumps({**self._contents, "files": files}))


def describe(state: Any) -> dict[str, str]:
    """Returns the type of every array by its path, such as ``.weights: float32[3]``."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    name = lambda leaf: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return {jax.tree_util.keystr(path): name(leaf) for path, leaf in leaves}


def compare(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Yields what differs between the contents of two seals."""
    old, new = found["setting"], wanted["setting"]
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            yield f"{name} is {old.get(name)} there and {new.get(name)} here"
    old, new = found["arrays"], wanted["arrays"]
    if lost := [f"{name} {old[name]}" for name in old if name not in new]:
        yield f"only there {_some(lost)}"
    if added := [f"{name} {new[name]}" for name in new if name not in old]:
        yield f"only here {_some(added)}"
    both = [name for name in old if new.get(name, old[name]) != old[name]]
    if changed := [f"{name} {old[name]} there and {new[name]} here" for name in both]:
        yield _some(changed)


def _some(names, most=4):
    return ", ".join([*names[:most], *([f"{len(names) - most} more"] * (len(names) > most))])


def damage(seal: epath.Path) -> str | None:
    """Says what is wrong with the files of a checkpoint, if anything."""
    try:
        files = json.loads(seal.read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"its seal {seal} cannot be read ({error})"
    for name, (size, checksum) in files.items():
        path = seal.parent / name
        if not path.exists():
            return f"{path} is missing"
        found = _size_and_checksum(path)
        if found[0] != size:
            return f"{path} has {found[0]} bytes instead of {size}"
        if found[1] != checksum:
            return f"{path} has been altered"
    return None


def _files(directory):
    for path in sorted(directory.iterdir()):
        yield from _files(path) if path.is_dir() else [path]


def _size_and_checksum(path):
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum
