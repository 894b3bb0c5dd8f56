"""`gs://` paths without a further dependency: TensorStore's own client, which Orbax's arrays go through anyway.

Orbax reaches everything else of a checkpoint (small JSON files, folders, the mark that it is complete) through etils,
whose paths on buckets need gcsfs or TensorFlow; `mount` puts a small path of our own in their place. A bucket has no
folders: making one does nothing, and one exists while an object lies below it.

Credentials are Google's usual ones: those of the machine (a TPU host's service account), those of `gcloud auth
application-default login`, or a file named by GOOGLE_APPLICATION_CREDENTIALS.

What this does not do: other clouds, renaming, appending.
"""

from __future__ import annotations

import fnmatch
import io
from collections.abc import Iterator
from functools import cache
from typing import Any, cast

import tensorstore
from etils import epath
from etils.epath import backend, gpath

from azr_jax.errors import UserError

SCHEME = "gs://"
PROBE = "azr_jax_probe"  # an object that is never there
PATIENCE_SECONDS = 180  # with one request; the largest object that goes through here has some tens of MB
#: What TensorStore's messages begin with, in words.
TROUBLE = {
    "PERMISSION_DENIED": "permission denied (this account needs roles/storage.objectAdmin on the bucket; where there "
    "is no service account: gcloud auth application-default login)",
    "UNAUTHENTICATED": "no valid credentials (gcloud auth application-default login)",
    "NOT_FOUND": "no such bucket",
    "RESOURCE_EXHAUSTED": "too many requests, or a quota is used up",
    "UNAVAILABLE": "the bucket cannot be reached",
    "DEADLINE_EXCEEDED": "the bucket does not answer (no network? or no credentials, which gcloud auth "
    "application-default login gets)",
    "ABORTED": "the bucket does not answer, tried many times",
}


def is_bucket(path: object) -> bool:
    """Whether this is a path on a bucket."""
    return str(path).startswith(SCHEME)


def split(path: object) -> tuple[str, str]:
    """gs://bucket/a/b -> ("bucket", "a/b"). UserError if there is no bucket, or nothing below it."""
    bucket, _, key = str(path).removeprefix(SCHEME).partition("/")
    key = key.strip("/")
    if not bucket or not key:
        raise UserError(f"{path} names no folder on a bucket; write gs://BUCKET/FOLDER", exit_code=2)
    return bucket, key


def trouble(error: BaseException) -> str | None:
    """What is wrong with the bucket, or None if the error is of another sort."""
    return next((cause for text, cause in TROUBLE.items() if str(error).startswith(text)), None)


@cache
def mount() -> None:
    """From now on `epath.Path("gs://...")` works as described above, in this process."""
    epath.register_path_cls(SCHEME)(_BucketPath)


def _wait(future: Any) -> Any:
    """What TensorStore promised; it asks for credentials, and a bucket without a network, for ever."""
    try:
        return future.result(timeout=PATIENCE_SECONDS)
    except TimeoutError:
        raise ValueError(f"DEADLINE_EXCEEDED: no answer for {PATIENCE_SECONDS} s") from None


class Objects:
    """The objects below one path. Names are relative to it. Errors are those of TensorStore: ValueError."""

    def __init__(self, path: object) -> None:
        """path: gs://bucket/folder; nothing is asked of the bucket yet. UserError: no bucket can have that name."""
        bucket, key = split(path)
        try:
            self._store = tensorstore.KvStore.open({"driver": "gcs", "bucket": bucket, "path": f"{key}/"}).result()
        except ValueError as error:
            raise UserError(f"{path}: {bucket!r} is no name of a bucket", exit_code=2) from error

    def names(self, below: str = "") -> list[str]:
        """Of all objects, or of those whose name begins with `below`, sorted."""
        # TensorStore takes a listing that was refused for an empty one. To tell that an object does not exist takes the
        # right to list, so reading one is refused as well, and that is reported.
        _wait(self._store.read(PROBE))
        end = below[:-1] + chr(ord(below[-1]) + 1) if below else ""
        return sorted(name.decode() for name in _wait(self._store.list(tensorstore.KvStore.KeyRange(below, end))))

    def read(self, name: str) -> bytes | None:
        """Content of an object; None if there is none."""
        found = _wait(self._store.read(name))
        return None if found.state == "missing" else found.value

    def read_all(self, names: list[str]) -> Iterator[tuple[str, bytes]]:
        """(name, content) of those that exist, several on their way at a time."""
        for some in _batches(names):
            for name, reading in [(name, self._store.read(name)) for name in some]:
                if (found := _wait(reading)).state != "missing":
                    yield name, found.value

    def write(self, name: str, content: bytes) -> None:
        """Whole or not at all."""
        _wait(self._store.write(name, content))

    def remove(self, names: list[str]) -> None:
        """Objects that are not there are no error."""
        for some in _batches(names):
            for done in [self._store.write(name, None) for name in some]:
                _wait(done)


def _batches(names: list[str], size: int = 16) -> Iterator[list[str]]:
    return (names[i : i + size] for i in range(0, len(names), size))


class _Upload(io.BytesIO):
    """A file that becomes an object when it is closed, unless an error was the reason, or nobody closed it."""

    def __init__(self, folder: Objects, name: str) -> None:
        super().__init__()
        self._folder, self._name = folder, name

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            self.give_up()  # whatever follows, there is no second try when Python clears it away
            self._folder.write(self._name, content)

    def give_up(self) -> None:
        super().close()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.give_up()

    def __del__(self) -> None:
        self.give_up()


class _TextUpload(io.TextIOWrapper):
    """The same for text."""

    buffer: _Upload

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.buffer.give_up()

    def __del__(self) -> None:
        self.buffer.give_up()


class _Backend(backend.Backend):
    """What etils asks of a file system, as far as Orbax uses it."""

    def open(self, path: Any, mode: str) -> Any:
        folder, name = _parent(path)
        if "r" in mode:
            content = folder.read(name)
            if content is None:
                raise FileNotFoundError(2, "no such object", str(path))
            file = io.BytesIO(content)
            return file if "b" in mode else io.TextIOWrapper(file, "utf-8")
        if "a" in mode:
            raise NotImplementedError("objects cannot be appended to")
        upload = _Upload(folder, name)
        return upload if "b" in mode else _TextUpload(upload, "utf-8", write_through=True)

    def exists(self, path: Any) -> bool:
        folder, name = _parent(path)
        return folder.read(name) is not None or self.isdir(path)

    def isdir(self, path: Any) -> bool:
        return bool(Objects(path).names())

    def listdir(self, path: Any) -> list[str]:
        return sorted({name.partition("/")[0] for name in Objects(path).names()})

    def glob(self, path: Any) -> list[str]:
        folder = str(path).partition("*")[0].rpartition("/")[0]
        return [found for name in self.listdir(folder) if fnmatch.fnmatch(found := f"{folder}/{name}", str(path))]

    def mkdir(self, path: Any, *, exist_ok: bool = False, mode: int | None = None) -> None:
        pass

    def makedirs(self, path: Any, *, exist_ok: bool = False, mode: int | None = None) -> None:
        pass

    def rmtree(self, path: Any) -> None:
        folder = Objects(path)
        folder.remove(folder.names())

    def remove(self, path: Any) -> None:
        folder, name = _parent(path)
        folder.remove([name])

    def walk(self, top: Any, *, top_down: bool = True, on_error: Any = None) -> Any:
        raise NotImplementedError

    def rename(self, path: Any, dst: Any) -> None:
        raise NotImplementedError

    def replace(self, path: Any, dst: Any) -> None:
        raise NotImplementedError

    def copy(self, path: Any, dst: Any, overwrite: bool) -> None:
        raise NotImplementedError

    def stat(self, path: Any) -> Any:
        raise NotImplementedError


class _BucketPath(gpath.PosixGPath):
    """A path on a bucket whose operations are those of `_Backend`."""

    @property
    def _backend(self) -> backend.Backend:
        return cast(backend.Backend, _Backend())


def _parent(path: object) -> tuple[Objects, str]:
    folder, _, name = str(path).rstrip("/").rpartition("/")
    return Objects(folder), name
