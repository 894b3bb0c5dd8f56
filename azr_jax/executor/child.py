"""What happens inside one sandboxed child: read a task, run it on each input, send back what came of it.

The child gets a program and argument lists and nothing else: no expected output, no other task. Each input sees the
program executed afresh in an empty namespace. Each outcome is one frame (length, tag, text), sent as soon as it is
known, and the last frame says that the child finished; anything less counts as a failure on the other side.
Whatever arrives there is only this child's claim about its own outputs.

Everything used after the program has run is bound before it runs, since the program may patch what it can reach.
"""

from __future__ import annotations

import builtins
import marshal
import os
import struct
import sys
from collections.abc import Callable
from typing import Any

from azr_jax.executor.lockdown import TASK_FD
from azr_jax.executor.plain import TooLarge, Unsupported, encode

# Tags of a frame. A frame is a 4-byte big-endian length (of what follows) and then the tag and its UTF-8 text.
VALUE, ERROR, MEMORY, LIMIT, UNSUPPORTED, SYNTAX, NO_FUNCTION, DONE = b"V", b"E", b"M", b"L", b"U", b"S", b"N", b"D"
_HEADER = struct.Struct(">I")
_UNOFFERED_BUILTINS = ("open", "input", "breakpoint", "help", "exit", "quit", "license", "credits", "copyright")

_NAME_OF: Any = vars(type)["__name__"].__get__  # what a metaclass of the program cannot fake

Send = Callable[[bytes, str], None]


def pack_task(program: str, inputs: list[tuple[tuple[Any, ...], dict[str, Any]]], max_chars: int) -> bytes:
    """The message a child reads: trusted data for an untrusted reader, hence marshal. Unmarshalled only there."""
    body = marshal.dumps((program, inputs, max_chars))
    return _HEADER.pack(len(body)) + body


def serve_task() -> None:
    """Read the task from TASK_FD, run it, send the outcomes. To be called in a child after its lock is on."""
    size = _HEADER.unpack(_read(4))[0]
    program, inputs, max_chars = marshal.loads(_read(size))
    run_task(program, inputs, max_chars, _sender())


def run_task(program: str, inputs: list[tuple[tuple[Any, ...], dict[str, Any]]], max_chars: int, send: Send) -> None:
    """Run `program` on each of `inputs`; one frame for each, or a single one if it does not compile, then DONE."""
    try:
        code: Any = compile(program, "<program>", "exec", 0, True)
    except MemoryError:  # also how the parser reports deep nesting
        send(SYNTAX, "")
    except (SyntaxError, ValueError, OverflowError, RecursionError):
        send(SYNTAX, "")
    else:
        for args, kwargs in inputs:
            _run_once(code, args, kwargs, max_chars, send)
    send(DONE, "")


def _run_once(
    code: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    max_chars: int,
    send: Send,
    execute: Any = exec,
    encode: Any = encode,
    is_callable: Any = callable,
    type_of: Any = type,
    name_of: Any = _NAME_OF,
    base_exception: Any = BaseException,
    memory_error: Any = MemoryError,
    too_large: Any = TooLarge,
    unsupported: Any = Unsupported,
    the_builtins: Any = builtins,
) -> None:
    namespace = {"__name__": "__main__", "__builtins__": the_builtins}
    stage = "run"
    try:
        execute(code, namespace)
        function: Any = namespace.get("f")
        if not is_callable(function):
            stage = "no function"
        else:
            result: Any = function(*args, **kwargs)
            stage = "encode"
            text = encode(result, max_chars)
            stage = "value"
    except memory_error:
        stage = "memory"
    except too_large:
        stage = stage if stage == "run" else "limit"
    except unsupported:
        stage = stage if stage == "run" else "unsupported"
    except base_exception as error:
        text = name_of(type_of(error))
        stage = "error"
    # Sent outside the try: a failure to send must not look like an outcome of the program.
    if stage == "value":
        send(VALUE, text)
    elif stage == "error":
        send(ERROR, text[:80])
    elif stage == "memory":
        send(MEMORY, "")
    elif stage == "limit":
        send(LIMIT, "")
    elif stage == "unsupported":
        send(UNSUPPORTED, "")
    elif stage == "no function":
        send(NO_FUNCTION, "")
    else:  # the program raised one of our own exception classes
        send(ERROR, "Exception")


def _read(size: int) -> bytes:
    chunks = []
    while size:
        chunk = os.read(TASK_FD, size)
        if not chunk:
            raise EOFError
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def _sender(write: Any = os.write, pack: Any = _HEADER.pack, length: Any = len, descriptor: int = TASK_FD) -> Send:
    def send(tag: bytes, text: str) -> None:
        body = tag + text.encode("utf-8", "backslashreplace")
        message = pack(length(body)) + body
        while message:
            message = message[write(descriptor, message) :]

    return send


def offer_modules(names: tuple[str, ...]) -> None:
    """Make `names` the only modules a program can import in this process, and take away file-like builtins.

    Modules that are already loaded stay importable for each other's code, never for a program's (`__main__`).
    """
    real_import = builtins.__import__
    offered = frozenset(names)
    loaded = sys.modules

    def import_offered(
        name: str,
        globals: Any = None,
        locals: Any = None,
        fromlist: Any = (),
        level: int = 0,
    ) -> Any:
        inside = globals is not None and globals.get("__name__") != "__main__"
        if level == 0 and name in loaded and (name in offered or inside):
            return real_import(name, globals, locals, fromlist, 0)
        if inside and level > 0:
            return real_import(name, globals, locals, fromlist, level)
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    builtins.__import__ = import_offered
    for name in _UNOFFERED_BUILTINS:
        if hasattr(builtins, name):
            delattr(builtins, name)
    sys.stdout = sys.stderr = None  # print does nothing; a write to a closed descriptor would raise
    sys.path.clear()
    sys.meta_path.clear()
    sys.path_hooks.clear()
