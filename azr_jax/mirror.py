"""A run folder on a bucket: the small files live in a working copy here, and go up at every checkpoint.

Objects cannot be appended to, and rows are appended all the time; so metrics.jsonl and the like are written locally and
copied as a whole. A checkpoint begins to be written (to the bucket itself, azr_jax.checkpoint) when the rows that
belong to it have arrived, so none in the bucket ever lacks rows, and rows beyond it are cut off on resume as after any
kill.

What this does not do: lock the bucket (two runs must not share a folder there), or copy checkpoints.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from azr_jax.bucket import Objects, split, trouble
from azr_jax.errors import UserError

log = logging.getLogger(__name__)

NOT_MIRRORED = ("checkpoints/", ".lock")
CONFIG = "config.yaml"


class Mirror:
    """A working copy of the run folder at a gs:// path."""

    def __init__(self, url: str) -> None:
        """url: gs://bucket/folder. The copy is below $XDG_CACHE_HOME or ~/.cache."""
        bucket, key = split(url)
        self.url = f"gs://{bucket}/{key}"
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.local = cache / "azr_jax" / "runs" / bucket / key
        self._objects = Objects(self.url)
        self._there: dict[str, tuple[int, int]] = {}  # what the bucket has: name -> (mtime, size) of our copy

    def fetch(self) -> None:
        """Makes the working copy what the bucket holds. UserError if that cannot be read.

        Rollouts, which are many and never change, are not fetched twice; unless the copy is of another run.
        """
        try:
            names = [name for name in self._objects.names() if name and name[-1] != "/"]  # the others mark folders
            there = [name for name in names if not name.startswith(NOT_MIRRORED)]
            config = self._objects.read(CONFIG)
            if config is None and there:
                raise UserError(f"{self.url} holds no run (no {CONFIG}) and is not empty; choose another run_dir")
            here = self._here()
            same = config is not None and CONFIG in here and (self.local / CONFIG).read_bytes() == config
            kept = {name for name in here if same and name in there and name.startswith("rollouts/")}
            for name in here.keys() - kept:
                (self.local / name).unlink()
            for name, content in self._objects.read_all([name for name in there if name not in kept]):
                path = self.local / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        except (ValueError, OSError) as error:
            raise self._trouble("read", error) from error
        self._there = {name: mark for name, mark in self._here().items() if name in there}
        log.info("%s: working copy in %s, %d files fetched", self.url, self.local, len(there) - len(kept))

    def push(self) -> None:
        """Copies what changed since the last time, and removes what is gone here. UserError if it cannot."""
        here = self._here()
        try:
            for name, mark in sorted(here.items()):
                if self._there.get(name) != mark:
                    self._objects.write(name, (self.local / name).read_bytes())
                    self._there[name] = mark
            gone = sorted(self._there.keys() - here.keys())
            self._objects.remove(gone)
            for name in gone:
                del self._there[name]
        except (ValueError, OSError) as error:
            raise self._trouble("write", error) from error

    def check(self) -> None:
        """A bucket whose listing does not show what was just written would one day look like an empty one."""
        if CONFIG not in self._objects.names(CONFIG):
            raise UserError(f"{self.url} cannot be listed; this account needs roles/storage.objectAdmin on the bucket")

    def _here(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in self.local.rglob("*"):
            name = path.relative_to(self.local).as_posix()
            if path.is_file() and not name.startswith(NOT_MIRRORED) and not name.endswith(".tmp"):
                found[name] = (path.stat().st_mtime_ns, path.stat().st_size)
        return found

    def _trouble(self, doing: str, error: Exception) -> UserError:
        if isinstance(error, OSError):
            return UserError(f"cannot {doing} the working copy {self.local}: {error.strerror or error}")
        return UserError(f"cannot {doing} {self.url}: {trouble(error) or error}")
