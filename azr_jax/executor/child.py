"""What happens inside one sandboxed child: read a task, run it on each input, send back what came of it.

The child gets a program and argument lists and nothing else: no expected output, no other task. Each input sees the
program executed afresh in an empty namespace. Each outcome is one frame (length, tag, text), sent as soon as it is
known, and a last frame says that the child finished; anything less counts as a failure on the other side.
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

from azr_jax.executor.heap import moved
from azr_jax.executor.plain import TooLarge, Unsupported

# Tags of a frame. A frame is a 4-byte big-endian length (of what follows) and then the tag and its UTF-8 text.
VALUE, ERROR, MEMORY, LIMIT, UNSUPPORTED, SYNTAX, NO_FUNCTION, DONE = b"V", b"E", b"M", b"L", b"U", b"S", b"N", b"D"
_HEADER = struct.Struct(">I")
_UNOFFERED_BUILTINS = ("open", "input", "breakpoint", "help", "exit", "quit", "license", "credits", "copyright")

_NAME_OF: Any = vars(type)["__name__"].__get__  # what a metaclass of the program cannot fake

Inputs = list[tuple[tuple[Any, ...], dict[str, Any]]]
Send = Callable[[bytes, str, bool], None]  # tag, text, whether the child has then finished


def pack_task(program: str, inputs: Inputs, max_chars: int) -> bytes:
    """The message a child reads: trusted data for an untrusted reader, hence marshal. Unmarshalled only there."""
    return marshal.dumps((program, inputs, max_chars))


def task_runner(encoded: Callable[[Any, int], str], answer: Send) -> Callable[[bytes], None]:
    """Build the function that runs a task (`pack_task`): one frame an input, or one if nothing compiles, then DONE.

    Each frame is sent as soon as it is known, DONE together with the last. Values are `encoded` (`plain.encoder`).
    Built in the worker, which costs no child anything, with all that it uses bound before any program runs; in cells
    rather than default arguments, because a call would touch each of those, and a page touched is a page copied.
    """
    loads, compiled, length = marshal.loads, compile, len
    execute, is_callable, the_builtins = exec, callable, builtins
    type_of, name_of = type, _NAME_OF
    memory_error, too_large, unsupported, base_exception = MemoryError, TooLarge, Unsupported, BaseException
    uncompilable = (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError)  # the last: too deeply nested

    def run_task(task: bytes) -> None:
        program, inputs, max_chars = loads(task)
        try:
            code: Any = compiled(program, "<program>", "exec", 0, True)
        except uncompilable:
            answer(SYNTAX, "", True)
            return
        left = length(inputs)
        for args, kwargs in inputs:
            left -= 1
            run_once(code, args, kwargs, max_chars, left == 0)

    def run_once(code: Any, args: tuple[Any, ...], kwargs: dict[str, Any], max_chars: int, last: bool) -> None:
        namespace = {"__name__": "__main__", "__builtins__": the_builtins}
        tag, text = ERROR, "Exception"  # this is what stays if the program raises an exception class of ours
        returned = False
        try:
            execute(code, namespace)
            function: Any = namespace.get("f")
            if not is_callable(function):
                tag, text = NO_FUNCTION, ""
            else:
                result: Any = function(*args, **kwargs)
                returned = True
                text = encoded(result, max_chars)
                tag = VALUE
        except memory_error:
            tag, text = MEMORY, ""
        except too_large:
            if returned:
                tag, text = LIMIT, ""
        except unsupported:
            if returned:
                tag, text = UNSUPPORTED, ""
        except base_exception as error:
            text = name_of(type_of(error))[:80]
        # Sent outside the try: a failure to send must not look like an outcome of the program.
        answer(tag, text, last)

    return run_task


def task_reader(descriptor: int) -> Callable[[int], bytes]:
    """Build the function that reads a task of a given size."""
    read, length = moved(os.read, descriptor), len

    def read_task(size: int) -> bytes:
        data = read(size)
        while length(data) < size:
            more = read(size - length(data))
            if not more:
                raise EOFError
            data += more
        return data

    return read_task


def sender(descriptor: int) -> Send:
    """Build the function that sends frames."""
    write, pack, length, done = moved(os.write, descriptor), _HEADER.pack, len, _HEADER.pack(1) + DONE

    def send(tag: bytes, text: str, last: bool) -> None:
        body = tag + text.encode("utf-8", "backslashreplace")
        message = pack(length(body)) + body
        if last:
            message += done
        while message:
            message = message[write(message) :]

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
