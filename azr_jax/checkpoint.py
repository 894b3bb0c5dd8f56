"""The whole training state as one atomic step on disk (Orbax), restored exactly or not at all.

A checkpoint is one folder, `step_000012`, holding two items: `state`, the arrays, written sharded by every host, and
`extra`, one JSON object with everything else (step, buffers, counters). Orbax writes into a temporary folder and
renames it when all hosts are done, so a kill at any moment leaves the previous checkpoint as it was.

The rename cannot protect against a disk that loses or flips bytes afterwards, and Orbax reads some of such damage back
as numbers without complaint. So `extra` also carries a fingerprint of every array, computed on the devices (an exact
integer sum, hence the same on any mesh) and checked on restore. What fails a check is skipped for an older checkpoint.

What this does not do: asynchronous saves (one save must not overlap the next update of an exactly resumable run), and
choosing when to save (the loop's business, with `azr_jax.signals` for preemption).
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from azr_jax.errors import UserError

logger = logging.getLogger(__name__)

State = TypeVar("State")  # a pytree of jax arrays

STEP_NAME = re.compile(r"step_(\d{6,})")
LEFTOVER_NAME = re.compile(r"step_\d{6,}(\.orbax-checkpoint-tmp.*|\.removed)")
#: Errors of the storage, not of the program, in the words of the operating system.
STORAGE_TROUBLE = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "file too large",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EROFS: "read-only file system",
    errno.ENOTDIR: "not a directory",
    errno.EEXIST: "a file is in the way",
    errno.EIO: "input/output error",
}


class Checkpointer:
    """Saves and restores checkpoints in one folder; keeps the newest `keep` of them.

    With several hosts every method must be called by every host, and the folder must be one they all share.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """folder: made on the first save. keep: >= 1."""
        if keep < 1:
            raise UserError(f"checkpoint.keep is {keep}, must be at least 1", exit_code=2)
        self.folder = Path(folder).absolute()  # Orbax wants absolute paths
        self.keep = keep
        self._orbax = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler(), extra=ocp.JsonCheckpointHandler())
        )

    def steps(self) -> list[int]:
        """Steps of all complete-looking checkpoints, ascending. They may still turn out to be damaged."""
        if not self.folder.is_dir():
            return []
        matches = (STEP_NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(match.group(1)) for match in matches if match)

    def latest(self) -> int | None:
        """Step of the newest checkpoint, or None. `restore` may have to settle for an older one."""
        steps = self.steps()
        return steps[-1] if steps else None

    def path(self, step: int) -> Path:
        """Folder of one checkpoint."""
        return self.folder / f"step_{step:06d}"

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Writes one checkpoint and returns when it is complete; then drops those beyond `keep`.

        state: pytree of jax arrays, any shardings (random keys as `jax.random.key_data`). extra: JSON-able.
        A checkpoint of the same step is replaced, and later ones, which only a resume that found them damaged can leave
        behind, are removed.

        Raises: UserError if the disk is full or not writable (earlier checkpoints stay), TypeError if `extra` cannot be
        written as JSON.
        """
        text = json.dumps(extra)
        record = {"extra": json.loads(text), "sha256": _sha256(text), "leaves": _describe(state, _fingerprints(state))}
        try:
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers()
            items = {"state": ocp.args.StandardSave(state), "extra": ocp.args.JsonSave(record)}
            with _quiet_orbax():
                self._orbax.save(self.path(step), args=ocp.args.Composite(**items), force=True)
            if jax.process_index() == 0:
                self._prune(step)
        except Exception as error:
            cause = _storage_trouble(error)
            if cause is None:
                raise
            with contextlib.suppress(OSError):
                self._remove_leftovers()
            older = self.latest()
            kept = f"the checkpoint of step {older} is untouched" if older is not None else "no checkpoint exists yet"
            raise UserError(
                f"cannot write a checkpoint to {self.folder}: {cause}. Free space or fix its permissions, then start "
                f"the same command again; {kept}."
            ) from error

    def restore(self, abstract_state: State) -> tuple[int, State, dict[str, Any]] | None:
        """The newest checkpoint that can be read: (step, state, extra), or None if there is none at all.

        abstract_state: pytree of jax.ShapeDtypeStruct with shardings, or of arrays, giving structure, shapes, dtypes
        and where each array shall live; the mesh need not be the one that saved. Restored arrays are committed to those
        shardings, so give every leaf (a scalar too) a sharding over the whole mesh. Damaged checkpoints are skipped
        with a warning.

        Raises: UserError if the state is of another shape than `abstract_state`, or if no checkpoint can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            with _quiet_orbax():
                try:
                    return (step, *self._read(step, abstract_state))
                except UserError:
                    raise
                except Exception as error:  # Orbax and TensorStore raise many types for damaged files
                    logger.warning("skipping checkpoint %s, it cannot be read: %s", self.path(step), _first_line(error))
                gc.collect()  # what Orbax abandoned goes here and now, quietly
        if not steps:
            return None
        raise UserError(
            f"none of the {len(steps)} checkpoints in {self.folder} can be read (steps {', '.join(map(str, steps))}). "
            "Restore the folder from a copy, or start over with another run_dir."
        )

    def read_extra(self, step: int) -> dict[str, Any]:
        """The JSON part of one checkpoint, without its arrays. Raises ValueError or OSError if damaged."""
        return self._read_record(step)["extra"]

    def restore_part(self, step: int, part: dict[str, Any]) -> dict[str, Any]:
        """Some arrays of one checkpoint; the others are not read.

        part: nested dicts of jax.ShapeDtypeStruct with shardings, keyed as the state (fields of a NamedTuple too).
        Raises: UserError if the checkpoint is damaged or of another shape. A part of an older one would not be the
        same state, so nothing is skipped.
        """
        try:
            with _quiet_orbax():
                saved = {_keys(name): leaf for name, leaf in self._read_record(step)["leaves"].items()}
                wanted = {_keys(name): name for name in _describe(part)}
                self._check_fits(step, {name: saved[keys] for keys, name in wanted.items() if keys in saved}, part)
                how = ocp.args.PyTreeRestore(
                    item=part, restore_args=ocp.checkpoint_utils.construct_restore_args(part), partial_restore=True
                )
                found = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(self.path(step) / "state", args=how)
                damaged = [
                    name for name, leaf in _describe(found, _fingerprints(found)).items() if saved[_keys(name)] != leaf
                ]
                if damaged:
                    raise ValueError(f"the content of {damaged[0]} is not what was saved")
                return found
        except UserError:
            raise
        except Exception as error:  # as in `restore`
            others = ", ".join(str(other) for other in self.steps() if other != step)
            rest = f"; there are also steps {others} (--step N)" if others else ""
            raise UserError(f"checkpoint {self.path(step)} is damaged{rest}: {_first_line(error)}") from error

    def _read(self, step: int, abstract_state: State) -> tuple[State, dict[str, Any]]:
        record = self._read_record(step)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, abstract_state)
        self._check_fits(step, record["leaves"], target)
        item = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        state = self._orbax.restore(self.path(step), args=item)["state"]
        found = _describe(state, _fingerprints(state))
        damaged = [name for name, leaf in record["leaves"].items() if found.get(name) != leaf]
        if damaged:
            raise ValueError(f"the content of {damaged[0]} is not what was saved")
        return state, record["extra"]

    def _read_record(self, step: int) -> dict[str, Any]:
        item = ocp.args.Composite(extra=ocp.args.JsonRestore())
        record = self._orbax.restore(self.path(step), args=item)["extra"]
        if not isinstance(record, dict) or not {"extra", "sha256", "leaves"} <= record.keys():
            raise ValueError("its JSON part is incomplete")
        if _sha256(json.dumps(record["extra"])) != record["sha256"]:
            raise ValueError("its JSON part is not what was saved")
        return record

    def _check_fits(self, step: int, saved: Mapping[str, Any], target: Any) -> None:
        """A checkpoint of another model is no damage: say so instead of skipping to an older one."""
        wanted = _describe(target)
        for name in sorted(saved.keys() | wanted.keys()):
            here, there = (leaves[name][:2] if name in leaves else None for leaves in (wanted, saved))
            if here != there:
                raise UserError(
                    f"checkpoint {self.path(step)} does not fit this configuration: {name} is {_shape_text(there)} "
                    f"there and {_shape_text(here)} here. Use the configuration it was made with, or another run_dir."
                )

    def _prune(self, saved: int) -> None:
        """The step just saved is the newest by definition; keeps it and the `keep` - 1 before it."""
        steps = self.steps()
        before = [step for step in steps if step < saved]
        excess = before[: max(0, len(before) - (self.keep - 1))] + [step for step in steps if step > saved]
        for step in excess:
            doomed = self.path(step).with_name(self.path(step).name + ".removed")
            self.path(step).rename(doomed)  # first out of sight: a kill while deleting leaves no half checkpoint
            shutil.rmtree(doomed)

    def _remove_leftovers(self) -> None:
        """What a kill in the middle of a save or of a removal left behind."""
        for entry in self.folder.iterdir():
            if LEFTOVER_NAME.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)


@jax.jit
def _leaf_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    """One uint32 an array: the sum of its bit patterns, each times an odd number of its position, modulo 2^32.

    Integer addition is associative, so the result does not depend on how the array is laid out over devices; an odd
    factor makes every changed element, and nearly every exchange of two, change the sum.
    """
    sums = []
    for leaf in leaves:
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
        position = jnp.zeros(bits.shape, jnp.uint32)
        for axis in range(bits.ndim):
            position = position * jnp.uint32(bits.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        # Spread positions over the word, or exchanging neighbours would shift the sum by a small multiple only.
        factor = (position * jnp.uint32(2654435761)) << 1 | jnp.uint32(1)  # Knuth's multiplicative hash
        sums.append(jnp.sum(bits * factor, dtype=jnp.uint32))
    return sums


def _fingerprints(state: Any) -> list[int]:
    """Of every leaf, in tree order. Leaves on different sets of devices cannot share one compiled program.

    What lies in host memory (offloaded moments) visits the devices one array after the other.
    """
    leaves = jax.tree.leaves(state)
    groups: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        away = leaf.sharding.memory_kind == "pinned_host"
        groups.setdefault(index if away else frozenset(leaf.sharding.device_set), []).append(index)
    sums = [0] * len(leaves)
    for key, indices in groups.items():
        group = [leaves[index] for index in indices]
        if isinstance(key, int):
            group = [jax.device_put(leaf, leaf.sharding.with_memory_kind("device")) for leaf in group]
        values = jax.device_get(_leaf_sums(group))
        for index, value in zip(indices, values, strict=True):
            sums[index] = int(value)
    return sums


def _describe(state: Any, fingerprints: list[int] | None = None) -> dict[str, list[Any]]:
    """{name of the leaf: [shape, dtype, fingerprint]}, as it looks after a trip through JSON."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    marks: list[int | None] = list(fingerprints) if fingerprints is not None else [None] * len(paths)
    return {
        jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype), mark]
        for (path, leaf), mark in zip(paths, marks, strict=True)
    }


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax raises, but also logs a page of traceback for every read or write that failed; users get our one line."""
    previous_hook = sys.unraisablehook
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    were_disabled = [one.disabled for one in loggers]
    sys.unraisablehook = lambda report: logger.debug("while handling a checkpoint: %r", report.exc_value)
    for one in loggers:
        one.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
    finally:
        sys.unraisablehook = previous_hook
        for one, was_disabled in zip(loggers, were_disabled, strict=True):
            one.disabled = was_disabled


def _keys(name: str) -> tuple[str, ...]:
    """The keys in a leaf's name, whatever held them: `.params['embed']` is `['params']['embed']`."""
    return tuple(re.findall(r"\w+", name))


def _shape_text(leaf: list[Any] | None) -> str:
    return "absent" if leaf is None else f"{leaf[1]}{leaf[0]}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.partition(" See full TensorStore details")[0][:300]  # what Orbax adds there is the name of a method


def _storage_trouble(error: BaseException | None) -> str | None:
    """What is wrong with the disk, in words, or None if the error is of another sort.

    TensorStore reports the operating system's error as text in a ValueError, Orbax chains others.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return STORAGE_TROUBLE.get(error.errno, str(error))
        for text in STORAGE_TROUBLE.values():
            if text in str(error).lower():
                return text
        error = error.__cause__ or error.__context__
    return None
