"""Where checkpoints lie: a local folder, or one on a bucket. Which are complete, how one goes, what a kill left behind.

On a disk a checkpoint is complete when Orbax has renamed it to `step_000012`. A bucket cannot rename; there Orbax
writes `step_000012/commit_success.txt` last of all, and what lacks it is half-written, or half removed.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Protocol

from etils import epath

from azr_jax import bucket

STEP_NAME = re.compile(r"step_(\d{6,})")
LEFTOVER_NAME = re.compile(r"step_\d{6,}(\.orbax-checkpoint-tmp.*|\.removed)")
COMPLETE = "commit_success.txt"  # Orbax's name for it


class Shelf(Protocol):
    """A place for checkpoints. Errors are those of the storage: OSError, and on a bucket ValueError."""

    folder: Path | epath.Path

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending. They may still turn out to be damaged."""

    def has(self, step: int) -> bool:
        """Whether that one is complete."""

    def remove(self, step: int) -> None:
        """A kill in the middle leaves none, or a leftover."""

    def tidy(self) -> None:
        """Make the folder if there is none; clear away what a kill in the middle of a save or a removal left."""


def shelf(folder: str | Path) -> Shelf:
    """The shelf in this folder, or below this gs:// path."""
    return BucketShelf(str(folder)) if bucket.is_bucket(folder) else LocalShelf(Path(folder).absolute())


def step_name(step: int) -> str:
    """Of the folder of a checkpoint."""
    return f"step_{step:06d}"


class LocalShelf:
    """A folder of this machine, or one that several machines share."""

    def __init__(self, folder: Path) -> None:
        """folder: absolute; made on the first `tidy`."""
        self.folder: Path | epath.Path = folder
        self._path = folder

    def steps(self) -> list[int]:
        if not self._path.is_dir():
            return []
        matches = (STEP_NAME.fullmatch(entry.name) for entry in self._path.iterdir() if entry.is_dir())
        return sorted(int(match.group(1)) for match in matches if match)

    def has(self, step: int) -> bool:
        return (self._path / step_name(step)).exists()

    def remove(self, step: int) -> None:
        doomed = self._path / f"{step_name(step)}.removed"
        (self._path / step_name(step)).rename(doomed)  # first out of sight: what is left of it is no checkpoint
        shutil.rmtree(doomed, ignore_errors=True)  # a file that somebody reads stays on NFS; `tidy` comes by again

    def tidy(self) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        for entry in self._path.iterdir():
            if LEFTOVER_NAME.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)


class BucketShelf:
    """A folder on a bucket."""

    def __init__(self, url: str) -> None:
        """url: gs://bucket/folder."""
        bucket.mount()
        self.folder: Path | epath.Path = epath.Path(url)
        self._objects = bucket.Objects(url)

    def steps(self) -> list[int]:
        matches = (re.fullmatch(rf"{STEP_NAME.pattern}/{COMPLETE}", name) for name in self._objects.names("step_"))
        return sorted(int(match.group(1)) for match in matches if match)

    def has(self, step: int) -> bool:
        return self._objects.read(f"{step_name(step)}/{COMPLETE}") is not None

    def remove(self, step: int) -> None:
        self._objects.remove([f"{step_name(step)}/{COMPLETE}"])
        self._objects.remove(self._objects.names(f"{step_name(step)}/"))

    def tidy(self) -> None:
        complete = {step_name(step) for step in self.steps()}
        self._objects.remove([name for name in self._objects.names("step_") if name.partition("/")[0] not in complete])
