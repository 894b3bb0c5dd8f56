"""Static rules: a fast, explained refusal of programs that are not worth running.

The paper lets a proposal through if it imports no listed module (Fig. 8), runs, and is deterministic (section 3.3.3).
Running and determinism are the executor's. Here are the rules that need only the text: it parses, defines `f` once at
the top level, and reaches for no module or name that gives access to the outside, to randomness or to the interpreter.

What it does not do: keep anyone safe. A determined program can get around any rule on text; safety is the executor's
sandbox, and determinism its repeated runs (`hash`, `id` and sets are therefore not refused here).
Helper functions and classes are allowed, where the released code refuses more than one top-level function.
"""

from __future__ import annotations

import ast
import re

from azr_jax.tasks.canonical import canonical_program, distinct_inputs, program_key, task_key
from azr_jax.tasks.kinds import Kind, Proposal
from azr_jax.tasks.syntax import ProgramError, Scopes, imported_modules, parse_program

__all__ = ["canonical_program", "distinct_inputs", "program_key", "proposal_rejection", "static_rejection", "task_key"]

#: Paper Fig. 8, with os and sys whole (its dotted entries such as `os.path` never match in the released check).
PAPER_MODULES = frozenset(
    "bcrypt calendar datetime hashlib logging multiprocessing os pebble random subprocess sys threading time".split()
)
#: More ways out: files, network, processes, clocks, randomness, the interpreter's own machinery.
_MORE_MODULES = (
    "_io _os _thread asyncio atexit bdb builtins cffi code codeop concurrent copyreg ctypes curses dbm dis "
    "faulthandler fcntl fileinput ftplib gc getpass glob http imaplib importlib inspect io linecache locale "
    "mailbox marshal mmap nt ntpath opcode pathlib pdb pickle pickletools pkgutil platform poplib posix posixpath "
    "pty resource runpy sched secrets select selectors shelve shutil signal site smtplib socket socketserver "
    "sqlite3 ssl symtable sysconfig syslog tarfile telnetlib tempfile termios timeit trace traceback tracemalloc "
    "tty urllib uuid venv weakref webbrowser xmlrpc zipfile zipimport zoneinfo"
)
BANNED_MODULES = PAPER_MODULES | frozenset(_MORE_MODULES.split())
#: Modules that others carry as an attribute (`re.enum.sys`); as attribute names they have no other use.
_CARRIED_MODULES = frozenset({"builtins", "ctypes", "importlib", "os", "posix", "subprocess", "sys"})
#: Builtins that compile text, reach the outside or open up the interpreter.
BANNED_NAMES = frozenset(
    (
        "breakpoint compile copyright credits delattr dir eval exec exit getattr globals help input license locals "
        "open quit setattr vars"
    ).split()
)
#: Double-underscore names with an honest use inside a pure function or a small class.
ALLOWED_DUNDERS = frozenset(
    f"__{name}__"
    for name in (
        "abs add all and bool call class contains debug delitem divmod doc enter eq exit float floordiv format ge "
        "getitem gt hash hex iadd imul index init int invert isub iter le len lshift lt main matmul missing mod mul "
        "name ne neg new next or pos post_init pow qualname radd repr reversed rmul round rshift rsub setitem slots "
        "str sub truediv xor"
    ).split()
)
#: Attributes that lead from a frame, generator, coroutine, traceback or function to the interpreter's state.
_FRAME_ATTRIBUTES = frozenset(
    (
        "CodeType FunctionType ag_code ag_frame attrgetter co_code co_consts cr_code cr_frame cr_origin f_back "
        "f_builtins f_code f_globals f_locals f_trace func_code func_globals gi_code gi_frame gi_yieldfrom "
        "methodcaller mro tb_frame tb_next"
    ).split()
)
#: Double-underscore names that are refused inside string literals too (format strings and the like spell them there).
_ESCAPES = re.compile(r"__(?:base|bases|builtins|closure|code|dict|globals|import|loader|mro|reduce|subclasses)__")
_DUNDER = re.compile(r"__\w+__")


def static_rejection(program: str) -> str | None:
    """Why the program is refused without running it, or None. Never raises, whatever the text.

    Reason codes: `too_long`, `too_deep`, `syntax_error`, `no_f`, `several_f`, `banned_module:NAME`, `banned_name:NAME`.
    Errors only the compiler finds (`return` outside a function) are left to the executor.
    """
    try:
        tree = parse_program(program)
        scopes = Scopes(tree)
        return _entry_rejection(tree, scopes) or _reach_rejection(tree, scopes)
    except ProgramError as error:
        return error.reason
    except RecursionError:
        return "too_deep"


def proposal_rejection(proposal: Proposal, n_inputs: int) -> str | None:
    """Static rules for a whole proposal: `static_rejection` of its program, or `too_few_inputs` for induction.

    An induction proposal needs `n_inputs` inputs that differ from each other, else hidden pairs repeat shown ones.
    Its program is from a buffer and was checked when it got there.
    """
    if proposal.kind is Kind.INDUCTION:
        return None if len(distinct_inputs(proposal.inputs)) >= n_inputs else "too_few_inputs"
    return static_rejection(proposal.program)


def _entry_rejection(tree: ast.Module, scopes: Scopes) -> str | None:
    """`f` must be one plain function at the top level, and nothing else may rebind it."""
    if not any(isinstance(node, ast.FunctionDef) and node.name == "f" for node in tree.body):
        return "no_f"
    return "several_f" if scopes.module.counts["f"] > 1 else None


def _reach_rejection(tree: ast.Module, scopes: Scopes) -> str | None:
    """The first module or name, in the order of the text, that the rules forbid."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            reason = _import_rejection(node)
        elif isinstance(node, ast.Name):
            reason = _name_rejection(node, scopes)
        elif isinstance(node, ast.Attribute):
            reason = _attribute_rejection(node.attr)
        elif isinstance(node, ast.MatchClass):
            reason = next(filter(None, map(_attribute_rejection, node.kwd_attrs)), None)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            escape = _ESCAPES.search(node.value)
            reason = f"banned_name:{escape.group()}" if escape else None
        else:
            reason = None
        if reason is not None:
            return reason
    return None


def _import_rejection(node: ast.Import | ast.ImportFrom) -> str | None:
    for module in imported_modules(node):
        root = module.split(".")[0]
        if not root:
            return "banned_module:relative"
        if root in BANNED_MODULES:
            return f"banned_module:{root}"
    for alias in node.names if isinstance(node, ast.ImportFrom) else []:
        if alias.name != "annotations" and (reason := _attribute_rejection(alias.name)) is not None:
            return reason
    return None


def _name_rejection(node: ast.Name, scopes: Scopes) -> str | None:
    if _DUNDER.fullmatch(node.id) and node.id not in ALLOWED_DUNDERS:
        return f"banned_name:{node.id}"
    if node.id in BANNED_NAMES:
        owner = scopes.of(node).resolve(node.id)
        # A parameter or local called `input` is fine; a module or class name may be unbound when it is read.
        if owner is None or owner.is_module or owner.is_class:
            return f"banned_name:{node.id}"
    return None


def _attribute_rejection(name: str) -> str | None:
    if name.strip("_") in _CARRIED_MODULES:
        return f"banned_module:{name.strip('_')}"
    if name in _FRAME_ATTRIBUTES or (_DUNDER.fullmatch(name) and name not in ALLOWED_DUNDERS):
        return f"banned_name:{name}"
    return None
