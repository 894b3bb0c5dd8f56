"""The run folder: everything a run leaves on disk except the checkpoints' own content.

    config.yaml             the resolved configuration
    config_changes.jsonl    configurations changed under the run, with the step
    metrics.jsonl           one object a step; names in docs/metrics.md
    tasks.jsonl             every validated task: Task.to_json() with "step" and "solve_rate"
    rollouts/step_000012.jsonl   some responses of a step: step, role, kind, prompt, response, verdict, reward
    oversight.jsonl         flagged texts, hash-chained (azr_jax.telemetry.oversight)
    checkpoints/            azr_jax.checkpoint
    outcome.json            a finished run's table before/after on fresh held-out tasks (rows of progress.Comparison)
    report.html             azr_jax.telemetry.report

Each append is one write of whole lines; what fails half-way is cut off again, and `begin_after` removes what a kill
left torn or ahead of the checkpoint, so that a resumed run continues the files as if nothing had happened. JSON is pure
ASCII: model text may hold lone surrogates, which no UTF-8 file can.

A gs:// path works alike: `path` is then a working copy here, which azr_jax.mirror keeps in step with the bucket, and
`checkpoints` is on the bucket itself.

What this does not do: work from several processes. On many hosts only the first opens the folder, the others have an
`Onlooker`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import yaml

from azr_jax.errors import ConfigError, UserError
from azr_jax.telemetry import oversight

if TYPE_CHECKING:
    from azr_jax.mirror import Mirror

logger = logging.getLogger(__name__)

#: Keys that may differ between two starts of one run: more steps extend it (unless the learning rate decays over them),
#: a folder may be moved, and how much is kept does not change what is computed.
FREE_KEYS = frozenset({"steps", "run_dir", "checkpoint.every", "checkpoint.keep"})
ROLLOUT_NAME = re.compile(r"step_(\d{6,})\.jsonl")


class RunFolder:
    """An open run folder, locked for this process. Use `RunFolder.open`; a context manager, or call `close`."""

    def __init__(self, path: Path, lock: int, mirror: Mirror | None = None) -> None:
        """lock: descriptor holding the lock, closed with the folder. mirror: of which `path` is the working copy."""
        self.path = path
        self.mirror = mirror
        self.metrics = path / "metrics.jsonl"
        self.tasks = path / "tasks.jsonl"
        self.oversight = path / "oversight.jsonl"
        self.rollouts = path / "rollouts"
        self.checkpoints: Path | str = f"{mirror.url}/checkpoints" if mirror else path / "checkpoints"
        self.report = path / "report.html"
        self.outcome = path / "outcome.json"
        self._lock: int | None = lock
        self._oversight_head: str | None = None  # hash of the last record, read on first use
        self._change: tuple[str, dict[str, tuple[Any, Any]]] | None = None  # a configuration to take over, as YAML

    @classmethod
    def open(cls, path: str | Path, config_yaml: str, allow_config_change: bool = False) -> RunFolder:
        """Creates or reopens a run folder and locks it.

        config_yaml: the resolved configuration as YAML text. A new run's is written at once. One that changes a run
        waits for `begin_after`: it may be one that the checkpoint does not go with, and must not be the run's then.
        Raises: UserError if the folder cannot be written or another live process has it; ConfigError if it holds a run
        of another configuration (apart from FREE_KEYS) that got as far as its first row or checkpoint, and
        `allow_config_change` is false.
        """
        path, mirror = _place(path)
        with _writing(path):
            (path / "rollouts").mkdir(parents=True, exist_ok=True)
            lock = _acquire(path / ".lock")
        folder = cls(path, lock, mirror)
        try:
            if mirror:
                mirror.fetch()
            folder._check_config(config_yaml, allow_config_change)
            if mirror:
                mirror.push()
                mirror.check()
        except BaseException:
            folder.close()
            raise
        return folder

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Releases the lock. Everything is on disk already."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def push(self) -> None:
        """Brings rows to the disk, and a bucket up to date; to be called before each checkpoint, and at the end.

        A checkpoint that outlives a power cut must not find rows missing. Raises: UserError if it cannot be written.
        """
        for path in (self.metrics, self.tasks, self.oversight):
            if path.exists():
                with _writing(path), path.open("rb+") as file:
                    os.fsync(file.fileno())
        if self.mirror:
            self.mirror.push()

    def append_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One row, {"step": step, name: number}. NumPy and JAX scalars are converted; NaN and infinity become null."""
        self._append(self.metrics, [{"step": step, **{name: _number(value) for name, value in metrics.items()}}])

    def append_tasks(self, step: int, tasks: Sequence[Mapping[str, Any]]) -> None:
        """Rows of tasks.jsonl; `step` is set on each."""
        self._append(self.tasks, [{**task, "step": step} for task in tasks])

    def append_oversight(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Rows of oversight.jsonl, linked to the rows before by their hashes. Each must hold its "step"."""
        for record in records:
            if not isinstance(record.get("step"), int):
                raise ValueError(f"an oversight record without a step: {record}")
        chained = oversight.chain(records, self.oversight_head)
        self._append(self.oversight, chained)
        if chained:
            self._oversight_head = chained[-1]["hash"]

    @property
    def oversight_head(self) -> str:
        """Hash of the last oversight record. Kept in checkpoints, it shows if records were cut off."""
        if self._oversight_head is None:
            self._oversight_head = oversight.GENESIS
            for row in read_rows(self.oversight):
                self._oversight_head = row.get("hash", self._oversight_head)
        return self._oversight_head

    def write_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rollouts/step_000012.jsonl, whole or not at all; `step` is set on each row."""
        text = "".join(json.dumps({**row, "step": step}) + "\n" for row in rows)
        _replace(self.rollouts / f"step_{step:06d}.jsonl", text.encode("ascii"))

    def write_outcome(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes outcome.json, whole or not at all. It goes again when the run goes on (`begin_after`)."""
        _replace(self.outcome, (json.dumps(rows, indent=1) + "\n").encode("ascii"))

    def begin_after(self, step: int) -> None:
        """Drops every row and rollout file of a later step, torn lines, and the outcome, which is no longer the last.

        A changed configuration becomes that of the run, and is noted with the step. To be called before the first step
        of every start, with the step of the restored checkpoint, or -1 if none.
        """
        for path in (self.metrics, self.tasks, self.oversight):
            _keep_rows(path, step)
        self._oversight_head = None
        with _writing(self.path):
            self.outcome.unlink(missing_ok=True)
            for entry in list(self.rollouts.iterdir()):
                match = ROLLOUT_NAME.fullmatch(entry.name)
                if (match and int(match.group(1)) > step) or entry.name.endswith(".tmp"):
                    entry.unlink()
        if self._change is not None:
            text, changes = self._change
            record = {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "step": max(step, 0),
                "changes": {key: {"old": old, "new": new} for key, (old, new) in changes.items()},
            }
            self._append(self.path / "config_changes.jsonl", [record])
            _replace(self.path / "config.yaml", text.encode("utf-8"))
            self._change = None

    def read_metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl in order, without torn lines; [] if there are none."""
        return list(read_rows(self.metrics))

    def _check_config(self, config_yaml: str, allow_config_change: bool) -> None:
        path = self.path / "config.yaml"
        if path.exists():
            with _writing(path):
                old_text = path.read_text(encoding="utf-8", errors="replace")
            if old_text == config_yaml:
                return
            changes = config_changes(old_text, config_yaml, str(path))
            # A start that failed before its first row (a wrong model, say) must not bind the corrected one.
            started = (self.path / "checkpoints").exists() or bool(self.read_metrics())
            # A decaying learning rate is planned over `steps`: with more of them it would jump back up.
            constant = (yaml.safe_load(config_yaml).get("learn") or {}).get("schedule", "constant") == "constant"
            free = FREE_KEYS if constant else FREE_KEYS - {"steps"}
            binding = {key: pair for key, pair in changes.items() if key not in free}
            if started and binding and not allow_config_change:
                listed = "; ".join(f"{key}: {_show(old)} -> {_show(new)}" for key, (old, new) in binding.items())
                raise ConfigError(
                    f"{self.path} holds a run of another configuration ({listed}). Choose a new run_dir, or add "
                    "--allow-config-change to go on with the new values (it is noted in config_changes.jsonl)."
                )
            if started and changes:
                self._change = config_yaml, changes
                return
        _replace(path, config_yaml.encode("utf-8"))

    def _append(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        if not rows:
            return
        data = "".join(json.dumps(row) + "\n" for row in rows).encode("ascii")
        with _writing(path), path.open("ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                written = 0
                while written < len(data):  # a raw write may be short on a disk that is filling up
                    written += file.write(data[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(before)
                raise


class Onlooker(RunFolder):
    """The run folder for a host that is not the first: the same paths, and nothing is read or written."""

    def __init__(self, path: str | Path) -> None:
        path, mirror = _place(path)
        super().__init__(path, -1, mirror)
        self._lock = None

    def push(self) -> None:
        pass

    def _append(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    @property
    def oversight_head(self) -> str:
        return oversight.GENESIS

    def write_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def write_outcome(self, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def begin_after(self, step: int) -> None:
        pass

    def read_metrics(self) -> list[dict[str, Any]]:
        return []


def _place(run_dir: str | Path) -> tuple[Path, Mirror | None]:
    """Where the files of a run folder lie here, and what brings them to a bucket."""
    if not str(run_dir).startswith("gs://"):
        return Path(run_dir).expanduser().absolute(), None
    from azr_jax.mirror import Mirror  # loads TensorStore, which a local folder does not need

    mirror = Mirror(str(run_dir))
    return mirror.local, mirror


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file, skipping torn or foreign lines. A missing or unreadable file has none."""
    try:
        for row, _ in _rows_with_lines(path):
            if row is not None:
                yield row
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("cannot read %s: %s", path, error.strerror)


def config_changes(old_yaml: str, new_yaml: str, where: str) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old, new)} of two configurations; a key that one of them lacks counts as None there."""
    try:
        old, new = _flatten(yaml.safe_load(old_yaml)), _flatten(yaml.safe_load(new_yaml))
    except yaml.YAMLError as error:
        problem = str(error).splitlines()[0]
        raise ConfigError(f"{where} is no readable YAML ({problem}). Repair it or choose a new run_dir.") from error
    keys = [*new, *(key for key in old if key not in new)]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _show(value: Any) -> str:
    return "(not set)" if value is None else json.dumps(value, default=str)


def _rows_with_lines(path: Path) -> Iterator[tuple[dict[str, Any] | None, bytes]]:
    """(row, raw line); the row is None for a line that is no whole JSON object with an integer step. Raises OSError."""
    with path.open("rb") as lines:
        for line in lines:
            row: Any = None
            if line.endswith(b"\n"):
                with contextlib.suppress(ValueError, RecursionError):
                    row = json.loads(line)
            yield (row if isinstance(row, dict) and isinstance(row.get("step"), int) else None), line


def _keep_rows(path: Path, step: int) -> None:
    """Rewrites a JSON-lines file without later, torn or foreign lines; leaves it alone if there are none."""
    if not path.exists():
        return
    kept, dropped = 0, 0
    temporary = path.with_name(path.name + ".tmp")
    with _writing(path):
        try:
            with temporary.open("wb") as file:
                for row, line in _rows_with_lines(path):
                    if row is not None and row["step"] <= step:
                        file.write(line)
                        kept += 1
                    else:
                        dropped += 1
                file.flush()
                os.fsync(file.fileno())
            if dropped:
                os.replace(temporary, path)
                logger.info("%s: dropped %d lines after step %d, kept %d", path.name, dropped, step, kept)
        finally:
            temporary.unlink(missing_ok=True)


def _replace(path: Path, data: bytes) -> None:
    """Atomic write: readers and kills see the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with _writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def _number(value: Any) -> int | float | None:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int):  # True counts as 1
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def _acquire(path: Path) -> int:
    """Takes the lock and returns its descriptor.

    A POSIX record lock: forked workers do not inherit it, so it ends with this process even if they outlive it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = os.read(descriptor, 100).decode("ascii", "replace").strip() or "another process"
            os.close(descriptor)
            raise UserError(
                f"{path.parent} is in use by a live run ({holder}). Stop that run, or choose another run_dir."
            ) from error
        logger.warning("cannot lock %s (%s): make sure that no other run uses this folder", path.parent, error.strerror)
        return descriptor
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode())
    return descriptor


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns errors of the operating system into one clear line."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "Free some space there; the same command then resumes the run.",
            errno.EDQUOT: "Free some of your quota there; the same command then resumes the run.",
            errno.EEXIST: "A file is in the way: remove it or choose another run_dir.",
            errno.ENOTDIR: "A file is in the way: remove it or choose another run_dir.",
        }.get(error.errno or 0, "Choose a run_dir that you may write to, or fix its permissions.")
        raise UserError(f"cannot write {path}: {error.strerror or error}. {advice}") from error
