"""What errors of disks and buckets mean: trouble of the storage in words, and trouble that is no damage.

TensorStore reports the operating system's error as text in a ValueError, Orbax chains others, so both questions are
asked of a whole chain of exceptions.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from azr_jax import bucket

#: Errors of the storage, not of the program, in the words of the operating system.
IN_WORDS = {
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
#: What errors of TensorStore begin with that say nothing about what is stored: no memory for it, a bucket that does not
#: answer, or not to us.
ELSEWHERE = tuple(status for status in bucket.TROUBLE if status != "NOT_FOUND")
#: Errors of the system that do: a file is not there, is a folder, cannot be read so far.
OF_CONTENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL}
SYSTEM_ERROR = re.compile(r"\[OS error (\d+)")


def trouble(error: BaseException | None, on_bucket: bool) -> str | None:
    """What is wrong with the disk or bucket, in words, or None if the error is of another sort."""
    for one in _chain(error):
        if on_bucket and (cause := bucket.trouble(one)) is not None:
            return cause
        if isinstance(one, OSError) and one.errno is not None:
            return IN_WORDS.get(one.errno, str(one))
        for text in IN_WORDS.values():
            if text in str(one).lower():
                return text
    return None


def may_be_whole(error: BaseException) -> bool:
    """Whether what could not be read may be undamaged: no permission, no memory, a network that is down."""
    for one in _chain(error):
        if isinstance(one, MemoryError) or str(one).startswith(ELSEWHERE):
            return True
        found = SYSTEM_ERROR.search(str(one))
        number = int(found[1]) if found else one.errno if isinstance(one, OSError) else None
        if number is not None and number not in OF_CONTENT:
            return True
    return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
