"""The whole training state as one atomic step on disk (Orbax), restored exactly or not at all.

A checkpoint is one folder, `step_000012`, holding two items: `state`, the arrays, written sharded by every host, and
`extra`, one JSON object with everything else (step, buffers, counters). `save` copies the arrays to host memory and
returns; a thread writes them into a temporary folder, which is renamed when all hosts are done. So training goes on
meanwhile, and a kill at any moment leaves the checkpoint before as it was.

The rename cannot protect against a disk that loses or flips bytes afterwards, and Orbax reads some of such damage back
as numbers without complaint. So `extra` also carries a fingerprint of every array, computed on the devices (an exact
integer sum, hence the same on any mesh) and checked on restore. What fails a check is skipped for an older checkpoint.

What this does not do: choosing when to save (the loop's business, with `azr_jax.signals` for preemption), and writing
two checkpoints at once: a save waits for the one before.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from azr_jax import bucket, storage
from azr_jax.dist.hosts import Hosts
from azr_jax.errors import UserError
from azr_jax.fingerprints import describe, fingerprints
from azr_jax.shelf import shelf, step_name

logger = logging.getLogger(__name__)

State = TypeVar("State")  # a pytree of jax arrays

PATIENCE_SECONDS = 3600  # with the other hosts' part of a save; a slow bucket takes minutes
#: What the best checkpoint is best at: sampled pass@1 on the fixed held-out set, all kinds together.
BEST_BY = "eval/sampled/pooled"


def best_step(scores: Mapping[int, float], saved: Collection[int]) -> int | None:
    """The step in `saved` with the highest score ({step: BEST_BY}); None if none has one.

    Of equals the earlier one: what came after it made no difference there and may have elsewhere.
    """
    known = [step for step in saved if step in scores]
    return min(known, key=lambda step: (-scores[step], step), default=None)


class Checkpointer:
    """Saves and restores checkpoints in one folder; keeps the newest `keep` of them, and the one said to be the best.

    A context manager: leaving it waits for a save under way. With several hosts every method must be called by every
    host, and the folder must be one they all share.
    """

    def __init__(self, folder: Path | str, keep: int, hosts: Hosts | None = None) -> None:
        """folder: local, or gs://bucket/folder; made on the first save. keep: >= 1. hosts: None: this one alone."""
        if keep < 1:
            raise UserError(f"checkpoint.keep is {keep}, must be at least 1", exit_code=2)
        self.keep, self._hosts = keep, hosts or Hosts()
        self._shelf = shelf(folder)
        self.folder = self._shelf.folder
        # Only reads. An AsyncCheckpointer would then wait for all hosts, also for one that cannot read its part.
        self._reader = ocp.CompositeCheckpointHandler(
            state=ocp.StandardCheckpointHandler(), extra=ocp.JsonCheckpointHandler()
        )
        self._orbax = ocp.AsyncCheckpointer(
            self._reader,
            async_options=ocp.options.AsyncOptions(
                create_directories_asynchronously=False, timeout_secs=PATIENCE_SECONDS
            ),
        )
        self._under_way: int | None = None  # step of the save that was not waited for yet
        self._best: int | None = None
        self._silence = contextlib.ExitStack()  # what Orbax would say in its thread

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):  # not Ctrl-C: that is in a hurry
            with contextlib.suppress(UserError):  # there is a first error to tell of
                self.wait()

    def steps(self) -> list[int]:
        """Steps of all complete-looking checkpoints, ascending. They may still turn out to be damaged."""
        with self._storage("read"):
            return self._shelf.steps()

    @property
    def under_way(self) -> set[int]:
        """The step that is being written, if one is."""
        return set() if self._under_way is None else {self._under_way}

    def latest(self) -> int | None:
        """Step of the newest checkpoint, or None. `restore` may have to settle for an older one."""
        steps = self.steps()
        return steps[-1] if steps else None

    def path(self, step: int) -> Path | epath.Path:
        """Folder of one checkpoint."""
        return self.folder / step_name(step)

    def save(self, step: int, state: Any, extra: Mapping[str, Any], best: int | None = None) -> None:
        """Begins to write one checkpoint; `wait`, or the next `save`, says whether it worked.

        state: pytree of jax arrays, any shardings (random keys as `jax.random.key_data`), copied before this returns:
        it may be donated at once. Host memory has to hold that copy. extra: JSON-able. best: a step to keep whatever
        its age. A checkpoint of the same step is replaced, and later ones, which only a resume that found them
        damaged can leave behind, are removed.

        Raises: UserError if the disk is full or not writable, now or in the save before (earlier checkpoints stay),
        TypeError if `extra` cannot be written as JSON.
        """
        self.wait()
        text = json.dumps(extra)
        record = {"extra": json.loads(text), "sha256": _sha256(text), "leaves": describe(state, fingerprints(state))}
        items = {"state": ocp.args.StandardSave(state), "extra": ocp.args.JsonSave(record)}
        with self._storage():
            self._under_way, self._best = step, best
            if jax.process_index() == 0:
                self._shelf.tidy()
                if self._shelf.has(step):  # a resume found it damaged
                    self._shelf.remove(step)
            self._silence.enter_context(_quiet_threads())
            with _quiet_orbax():
                self._orbax.save(self.path(step), args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Returns when the last `save` is complete, and those beyond `keep` are removed. UserError as there."""
        step = self._under_way
        if step is None:
            return
        with self._storage():
            self._orbax.wait_until_finished()
            self._under_way = None
            if jax.process_index() == 0 and self._shelf.has(step):  # an error is told once: it may be another's
                self._prune(step)
        self._silence.close()  # after a failure its threads go on complaining

    def poll(self) -> None:
        """As `wait` if the last save is complete or failed; else nothing."""
        with self._storage():
            self._orbax.check_for_errors()
        if not self.saving:
            self.wait()

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        try:
            return self._under_way is not None and not self._shelf.has(self._under_way)
        except (OSError, ValueError):  # whoever waits for it will hear of it
            return False

    def restore(self, abstract_state: State) -> tuple[int, State, dict[str, Any]] | None:
        """The newest checkpoint that can be read: (step, state, extra), or None if there is none at all.

        abstract_state: pytree of jax.ShapeDtypeStruct with shardings, or of arrays, giving structure, shapes, dtypes
        and where each array shall live; the mesh need not be the one that saved. Restored arrays are committed to those
        shardings, so give every leaf (a scalar too) a sharding over the whole mesh. Damaged checkpoints are skipped
        with a warning.

        Raises: UserError if the state is of another shape than `abstract_state`, or if no checkpoint can be read.
        """
        steps = self.steps()
        for host, seen in enumerate(self._hosts.tell("the checkpoints", json.dumps(steps))):
            if json.loads(seen) != steps:
                raise UserError(
                    f"host {host} sees checkpoints of other steps in {self.folder} ({seen}) than host "
                    f"{self._hosts.index} ({steps}); it must be on storage that all hosts share"
                )
        for step in reversed(steps):
            with _quiet_orbax():
                try:
                    return (step, *self._read(step, abstract_state))
                except UserError:
                    raise
                except Exception as error:  # Orbax and TensorStore raise many types for damaged files
                    if storage.may_be_whole(error):
                        raise UserError(
                            f"cannot read checkpoint {self.path(step)}: {_first_line(error)}. It may be whole, so no "
                            "older one is taken for it. Put that right, or try again later"
                        ) from error
                    logger.warning("skipping checkpoint %s, it cannot be read: %s", self.path(step), _first_line(error))
                gc.collect()  # what Orbax abandoned goes here and now, quietly
        if not steps:
            return None
        raise UserError(
            f"none of the {len(steps)} checkpoints in {self.folder} can be read (steps {', '.join(map(str, steps))}). "
            "Restore the folder from a copy, or start over with another run_dir."
        )

    def restore_part(self, step: int, part: dict[str, Any]) -> dict[str, Any]:
        """Some arrays of one checkpoint; the others are not read.

        part: nested dicts of jax.ShapeDtypeStruct with shardings, keyed as the state (fields of a NamedTuple too).
        Raises: UserError if the checkpoint is damaged or of another shape. A part of an older one would not be the
        same state, so nothing is skipped.
        """
        try:
            with _quiet_orbax():
                saved = {_keys(name): leaf for name, leaf in self._read_record(step)["leaves"].items()}
                wanted = {_keys(name): name for name in describe(part)}
                self._check_fits(step, {name: saved[keys] for keys, name in wanted.items() if keys in saved}, part)
                how = ocp.args.PyTreeRestore(
                    item=part, restore_args=ocp.checkpoint_utils.construct_restore_args(part), partial_restore=True
                )
                found = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(self.path(step) / "state", args=how)
                damaged = [
                    name for name, leaf in describe(found, fingerprints(found)).items() if saved[_keys(name)] != leaf
                ]
                if damaged:
                    raise ValueError(f"the content of {damaged[0]} is not what was saved")
                return found
        except UserError:
            raise
        except Exception as error:  # as in `restore`
            if storage.may_be_whole(error):
                raise UserError(f"cannot read checkpoint {self.path(step)}: {_first_line(error)}") from error
            others = ", ".join(str(other) for other in self.steps() if other != step)
            rest = f"; there are also steps {others} (--step N)" if others else ""
            raise UserError(f"checkpoint {self.path(step)} is damaged{rest}: {_first_line(error)}") from error

    def _read(self, step: int, abstract_state: State) -> tuple[State, dict[str, Any]]:
        trouble: Exception | None = None
        try:
            record = self._read_record(step)
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, abstract_state)
            self._check_fits(step, record["leaves"], target)
            item = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            state = self._reader.restore(self.path(step), args=item)["state"]
        except Exception as error:
            trouble = error
        if self._hosts.agree(f"reading the checkpoint of step {step}", trouble is not None):
            raise trouble or ValueError("another host cannot")
        found = describe(state, fingerprints(state))
        damaged = [name for name, leaf in record["leaves"].items() if found.get(name) != leaf]
        if damaged:
            raise ValueError(f"the content of {damaged[0]} is not what was saved")
        return state, record["extra"]

    def _read_record(self, step: int) -> dict[str, Any]:
        item = ocp.args.Composite(extra=ocp.args.JsonRestore())
        record = self._reader.restore(self.path(step), args=item)["extra"]
        if not isinstance(record, dict) or not {"extra", "sha256", "leaves"} <= record.keys():
            raise ValueError("its JSON part is incomplete")
        if _sha256(json.dumps(record["extra"])) != record["sha256"]:
            raise ValueError("its JSON part is not what was saved")
        return record

    def _check_fits(self, step: int, saved: Mapping[str, Any], target: Any) -> None:
        """A checkpoint of another model is no damage: say so instead of skipping to an older one."""
        wanted = describe(target)
        for name in sorted(saved.keys() | wanted.keys()):
            here, there = (leaves[name][:2] if name in leaves else None for leaves in (wanted, saved))
            if here != there:
                raise UserError(
                    f"checkpoint {self.path(step)} does not fit this configuration: {name} is {_shape_text(there)} "
                    f"there and {_shape_text(here)} here. Use the configuration it was made with, or another run_dir."
                )

    @contextlib.contextmanager
    def _storage(self, doing: str = "write") -> Iterator[None]:
        """Turns trouble with the disk into one clear line, and clears away what is half-written.

        Threads of Orbax may still be writing there; what they leave goes with the next save.
        """
        try:
            yield
        except Exception as error:
            if doing == "write":
                self._under_way = None
            cause = storage.trouble(error, bucket.is_bucket(self.folder))
            if cause is None:
                raise
            if doing == "read":
                raise UserError(f"cannot read checkpoints in {self.folder}: {cause}") from error
            older = None
            with contextlib.suppress(OSError, ValueError, UserError):
                if jax.process_index() == 0:
                    self._shelf.tidy()
                older = self.latest()
            kept = f"the checkpoint of step {older} is untouched" if older is not None else "no checkpoint exists yet"
            raise UserError(
                f"cannot write a checkpoint to {self.folder}: {cause}. Free space or fix its permissions, then start "
                f"the same command again; {kept}."
            ) from error

    def _prune(self, saved: int) -> None:
        """The step just saved is the newest by definition; keeps it, the `keep` - 1 before it, and the best."""
        steps = self.steps()
        before = [step for step in steps if step < saved]
        excess = before[: max(0, len(before) - (self.keep - 1))] + [step for step in steps if step > saved]
        for step in excess:
            if step != self._best:
                self._shelf.remove(step)


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax raises, but also logs a page of traceback for every read or write that failed; users get our one line."""
    with _quiet_threads(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        yield


def _quiet_threads() -> contextlib.ExitStack:
    """The part of it that can hold for as long as a save takes, from this call on.

    It ends where it is left, and not when it is cleared away: after a save that failed, threads complain to the end.
    """

    def drop(_: logging.LogRecord) -> bool:
        return False

    quiet = contextlib.ExitStack()
    quiet.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
    sys.unraisablehook = lambda report: logger.debug("while handling a checkpoint: %r", report.exc_value)
    for one in map(logging.getLogger, ("absl", "asyncio")):
        one.addFilter(drop)
        quiet.callback(one.removeFilter, drop)
    return quiet


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
