# ruff: noqa: E501 - one attack a line reads better than a folded one
"""Hostile programs: what a policy that is paid for passing checks could write, by class of attack.

A case is (name, program, statuses it may end in). `f` is called with 7. A case that may be "ok" also names the output
that is right. Programs under `run` meet no static rules: containment must not depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass

RAISED = ("error",)
DEAD = ("error", "crashed")
STOPPED = ("timeout",)
FULL = ("memory", "error", "output_limit", "timeout")

#: How a program gets at modules it cannot import: any class leads to all classes, one of them to the loader of builtins.
REACH = """
def reach(name):
    for cls in ().__class__.__base__.__subclasses__():
        if cls.__name__ == 'BuiltinImporter':
            return cls.load_module(name)
def loaded(name):
    import collections
    return collections._sys.modules[name]
"""


@dataclass(frozen=True)
class Case:
    """One hostile program and how it may end."""

    name: str
    program: str
    statuses: tuple[str, ...]
    output: str = ""


def _f(body: str) -> str:
    return "def f(x):\n" + "".join(f"    {line}\n" for line in body.strip("\n").split("\n"))


def _reach(body: str) -> str:
    return REACH + _f(body)


def _group(prefix: str, statuses: tuple[str, ...], programs: dict[str, str]) -> list[Case]:
    return [Case(f"{prefix}: {name}", program, statuses) for name, program in programs.items()]


PROCESSES = _group("process", DEAD, {
    "fork": _reach("return reach('posix').fork()"),
    "fork bomb": _reach("while True: reach('posix').fork()"),
    "double fork daemon": _reach("p = reach('posix')\nif p.fork() == 0:\n    p.setsid()\n    p.fork()\nreturn 1"),
    "forkpty": _reach("return reach('posix').forkpty()[0]"),
    "exec": _reach("reach('posix').execv('/bin/sh', ['sh', '-c', 'touch /tmp/azr-pwned'])"),
    "spawn": _reach("return reach('posix').posix_spawn('/bin/sh', ['sh'], {})"),
    "thread": _reach("return reach('_thread').start_new_thread(f, (1,))"),
    "import os": "import os\ndef f(x):\n    return os.getpid()\n",
    "import os inside": _f("import os\nreturn os.system('true')"),
    "dunder import": _f("return __import__('o' + 's').getcwd()"),
    "import subprocess": _f("import subprocess\nreturn subprocess.run(['true'])"),
    "import multiprocessing": _f("import multiprocessing\nreturn 1"),
    "import threading": _f("import threading\nreturn threading.active_count()"),
    "import ctypes": _f("import ctypes\nreturn ctypes.CDLL(None).fork()"),
    "importlib": _f("import importlib\nreturn importlib.import_module('os').getpid()"),
    "relative import": _f("from . import os\nreturn 1"),
    "import of ours": _f("from azr_jax.executor import zygote\nreturn 1"),
    "import main": _f("import __main__\nreturn 1"),
    "kill parent": _reach("p = reach('posix')\np.kill(p.getppid(), 9)\nreturn 1"),
    "kill everyone": _reach("reach('posix').kill(-1, 9)\nreturn 1"),
    "kill group": _reach("reach('posix').killpg(0, 9)\nreturn 1"),
    "stop parent": _reach("p = reach('posix')\np.kill(p.getppid(), 19)\nreturn 1"),
    "kill init": _reach("reach('posix').kill(1, 9)\nreturn 1"),
    "scheduler": _reach("reach('posix').sched_setaffinity(0, {0})\nreturn 1"),
    "nice": _reach("reach('posix').nice(-5)\nreturn 1"),
    "setuid": _reach("reach('posix').setuid(1234)\nreturn 1"),
    "chroot": _reach("reach('posix').chroot('/')\nreturn 1"),
})  # fmt: skip

FILES = _group("file", DEAD, {
    "open passwd": _f("return open('/etc/passwd').read()"),
    "io open": _f("import io\nreturn io.open('/etc/passwd').read()"),
    "posix open": _reach("return reach('posix').open('/etc/passwd', 0)"),
    "loaded io": _reach("return reach('_io').open('/etc/passwd').read()"),
    "file io": _reach("return reach('_io').FileIO('/proc/self/status').read()"),
    "write tmp": _reach("reach('_io').open('/tmp/azr-pwned', 'w').write('x')\nreturn 1"),
    "write shm": _reach("reach('posix').open('/dev/shm/azr-pwned', 66)\nreturn 1"),
    "unlink": _reach("reach('posix').unlink('/tmp/azr-victim')\nreturn 1"),
    "mkdir": _reach("reach('posix').mkdir('/tmp/azr-pwned-dir')\nreturn 1"),
    "list root": _reach("return reach('posix').listdir('/')"),
    "stat": _reach("return reach('posix').stat('/etc/passwd').st_size"),
    "readlink exe": _reach("return reach('posix').readlink('/proc/self/exe')"),
    "environ of parent": _reach("p = reach('posix')\nreturn p.open(f'/proc/{p.getppid()}/environ', 0)"),
    "memory of parent": _reach("p = reach('posix')\nreturn p.open(f'/proc/{p.getppid()}/mem', 0)"),
    "own maps": _reach("return reach('_io').open('/proc/self/maps').read()"),
    "getcwd": _reach("return reach('posix').getcwd()"),
    "chdir": _reach("reach('posix').chdir('/tmp')\nreturn 1"),
    "symlink": _reach("reach('posix').symlink('/etc/passwd', '/tmp/azr-link')\nreturn 1"),
    "memfd": _reach("return reach('posix').memfd_create('x')"),
    "pipe": _reach("return reach('posix').pipe()"),
    "dup": _reach("return reach('posix').dup(3)"),
    "read stdin": _f("return input()"),
    "read fd 0": _reach("return reach('posix').read(0, 10)"),
    "read fd 4": _reach("return reach('posix').read(4, 10)"),
    "write fd 1": _reach("return reach('posix').write(1, b'x')"),
    "write fd 2": _reach("return reach('posix').write(2, b'x' * 1000000)"),
    "device": _reach("return reach('posix').open('/dev/null', 0)"),
    "codecs open": _f("import codecs\nreturn codecs.open('/etc/passwd').read()"),
    "source loader": _f("return f.__globals__['__builtins__'].__loader__.get_data('/etc/passwd')"),
    "linecache": _reach("return loaded('linecache').getlines('/etc/passwd')[0]"),
})  # fmt: skip

NETWORK = _group("network", DEAD, {
    "socket": _f("import socket\nreturn socket.socket().fileno()"),
    "loaded socket": _reach("return loaded('socket').socket().fileno()"),
    "loaded _socket": _reach("return loaded('_socket').socket().fileno()"),
    "socketpair": _reach("return loaded('_socket').socketpair()[0].fileno()"),
    "metadata server": _reach("s = loaded('socket')\nreturn s.create_connection(('169.254.169.254', 80), 1).recv(9)"),
    "adopt descriptor": _reach("return loaded('socket').socket(fileno=3).getpeername()"),
    "send descriptors": _reach("s = loaded('socket').socket(1, 1, 0, 3)\nreturn s.sendmsg([b'x'], [(1, 1, b'\\0' * 4)])"),
    "urllib": _f("import urllib.request\nreturn urllib.request.urlopen('http://127.0.0.1').read()"),
    "hostname": _reach("return loaded('socket').gethostname()"),
})  # fmt: skip

HIDDEN = [  # clock, randomness, identity: nothing there to see
    *_group("hidden", DEAD, {
        "import time": _f("import time\nreturn time.time()"),
        "builtin time": _reach("return reach('time').time()"),
        "monotonic": _reach("return reach('time').monotonic_ns()"),
        "perf counter": _reach("return reach('time').perf_counter()"),
        "thread time": _reach("return reach('time').thread_time()"),
        "sleep": _reach("reach('time').sleep(60)\nreturn 1"),
        "datetime": _f("import datetime\nreturn str(datetime.datetime.now())"),
        "random": _f("import random\nreturn random.random()"),
        "secrets": _f("import secrets\nreturn secrets.randbelow(2)"),
        "urandom": _reach("return reach('posix').urandom(1)"),
        "getrandom": _reach("return reach('posix').getrandom(1)"),
        "uuid": _f("import uuid\nreturn str(uuid.uuid4())"),
        "statistics sampling": _f("import statistics\nreturn statistics.NormalDist().samples(1)"),
        "statistics random": _f("import statistics\nreturn statistics.random.random()"),
        "uname": _reach("return reach('posix').uname().nodename"),
        "load average": _reach("return reach('posix').getloadavg()"),
        "environment": _reach("return loaded('os').environ['PATH']"),
    }),
    Case("hidden: raw environment is empty", _reach("return len(loaded('os').environ)"), ("ok",), "0"),
    Case("hidden: pid is no coin", _reach("p = reach('posix')\nreturn p.getpid() == p.getppid()"), (*DEAD, "ok"), "True"),
]  # fmt: skip

MEMORY = _group("memory", FULL, {
    "string": _f("return len('a' * 10**10)"),
    "list": _f("a = []\nwhile True: a.append('x' * 10**6)"),
    "doubling": _f("a = [0]\nwhile True: a += a"),
    "shift": _f("return (1 << 10**11) % 7"),
    "bytearray": _f("return len(bytearray(10**10))"),
    "range list": _f("return len(list(range(10**10)))"),
    "dict": _f("d = {}\nfor i in range(10**9): d[i] = [i]\nreturn 1"),
    "caught and again": _f("a = []\nwhile True:\n    try:\n        a.append(bytearray(10**8))\n    except MemoryError:\n        a = a"),
    "repr": _f("a = ['x' * 10**6] * 10**4\nreturn len(repr(a))"),
    "format": _f("return len(f'{1:>9999999999}')"),
    "join": _f("return len('x'.join(['y' * 10**6] * 10**5))"),
    "product": _f("import itertools\nreturn len(list(itertools.product(range(100), repeat=5)))"),
    "regex": _f("import re\nreturn len(re.compile('(' * 50 + 'a' + ')' * 50 + '{65535}' * 4).pattern)"),
    "decimal": _f("import decimal\nreturn len(str(decimal.Decimal(1).scaleb(999999999) * 1))"),
})  # fmt: skip

SPINS = _group("spin", STOPPED, {
    "while": _f("while True: pass"),
    "swallow everything": _f("while True:\n    try:\n        while True: pass\n    except BaseException:\n        pass"),
    "finally": _f("try:\n    while True: pass\nfinally:\n    return 1"),
    "big power": _f("return (10**10**8) % 7"),
    "sum of range": _f("return sum(range(10**12))"),
    "count": _f("import itertools\nreturn sum(itertools.count())"),
    "max of cycle": _f("import itertools\nreturn max(itertools.cycle([1]))"),
    "regex backtracking": _f("import re\nreturn bool(re.match('(a+)+$', 'a' * 60 + 'b'))"),
    "string search": _f("return ('a' * 10**7 + 'b').count('a' * 5 * 10**6 + 'b') + f(x)"),
    "sorting": _f("while True: sorted(range(10**6))"),
    "at import": "while True: pass\ndef f(x):\n    return 1\n",
    "recursive generator": _f("def g():\n    while True: yield 1\nfor _ in g(): pass"),
    "repr loop in result": "class L(list):\n    def __len__(self):\n        while True: pass\ndef f(x):\n    return len(L())\n",
    "hash loop": "class K:\n    def __hash__(self):\n        while True: pass\ndef f(x):\n    return {K(): 1}\n",
    "exception text": "class E(Exception):\n    def __init__(self):\n        while True: pass\ndef f(x):\n    raise E\n",
    "del": "class D:\n    def __del__(self):\n        while True: pass\ndef f(x):\n    D()\n    return 1\n",
    "metaclass": "class M(type):\n    def __call__(cls):\n        while True: pass\nclass A(metaclass=M): pass\ndef f(x):\n    return A()\n",
    "fraction": _f("import fractions\na = fractions.Fraction(1, 3)\nwhile True: a = a * a + 1"),
    "int to float": _f("a = 3\nwhile True: a = a * a % (10**2000 + 7)"),
    "alarm handler": _reach("s = reach('_signal')\ntry:\n    s.signal(24, s.SIG_IGN)\n    s.alarm(0)\nexcept OSError:\n    pass\nwhile True: pass"),
    "own limits": _reach("try:\n    loaded('resource').setrlimit(0, (99, 99))\nexcept (OSError, ValueError):\n    pass\nwhile True: pass"),
})  # fmt: skip

SLEEPS = _group("sleep", (*STOPPED, "error", "crashed", "ok"), {  # ok: a refused wait returns at once
    "deadlock": _reach("lock = reach('_thread').allocate_lock()\nlock.acquire()\nlock.acquire()"),
    "pause": _reach("reach('_signal').pause()\nreturn 1"),
    "sigwait": _reach("reach('_signal').sigwait({15})\nreturn 1"),
    "select": _reach("loaded('select').select([], [], [])\nreturn 1"),
    "read own socket": _reach("reach('posix').read(3, 10)\nreturn 1"),
    "stop itself": _reach("p = reach('posix')\np.kill(p.getpid(), 19)\nwhile True: pass"),
    "wait": _reach("reach('posix').wait()\nreturn 1"),
})  # fmt: skip

DEATHS = _group("death", ("error", "crashed", "syntax_error"), {
    "os._exit": _reach("reach('posix')._exit(0)"),
    "abort": _reach("reach('posix').abort()"),
    "system exit": _f("raise SystemExit"),
    "system exit 0": _f("raise SystemExit(0)"),
    "keyboard interrupt": _f("raise KeyboardInterrupt"),
    "generator exit": _f("raise GeneratorExit"),
    "stop iteration": _f("raise StopIteration"),
    "base exception": "class B(BaseException): pass\ndef f(x):\n    raise B\n",
    "exit builtin": _f("exit()"),
    "bad code object": _f("f.__code__ = f.__code__.replace(co_consts=())\nreturn f(x)"),
    "bytecode": _f("f.__code__ = f.__code__.replace(co_code=bytes([100, 200] * 20))\nreturn f(x)"),
    "null pointer": _reach("return loaded('ctypes').string_at(0)"),
    "recursion": _f("return f(x + 1)"),
    "recursion through repr": _f("a = []\nfor _ in range(10**5): a = [a]\nreturn repr(a)"),
    "recursion limit": _reach("loaded('sys').setrecursionlimit(10**9)\ndef g(n): return [g(n + 1)] + sorted([1], key=g)\nreturn g(0)"),
    "deep attribute": _f("return eval('x' + '.real' * 50000)"),
    "deep parentheses": _f("return eval('(' * 5000 + ')' * 5000)"),
    "deep unary": _f("return eval('-' * 30000 + '1')"),
    "nul byte": "def f(x):\n    return 1\n\0",
    "lone surrogate": "def f(x):\n    return '\ud800' + 1\n",
    "no function": "x = 1\n",
    "f is no function": "f = 3\n",
    "syntax": "def f(x:\n",
    "wrong arguments": "def f():\n    return 1\n",
    "deep source": "def f(x):\n    return " + "(" * 3000 + ")" * 3000 + "\n",
    "exception chain": _f("e = None\nfor i in range(10**5):\n    n = ValueError(i)\n    n.__cause__ = e\n    e = n\nraise e"),
    "fake timeout": "class TimeoutError(Exception): pass\ndef f(x):\n    raise TimeoutError('timeout')\n",
    "lying exception name": "class M(type):\n    __name__ = property(lambda c: 1 / 0)\nclass E(Exception, metaclass=M): pass\ndef f(x):\n    raise E\n",
    "our own exception": _reach("raise loaded('azr_jax.executor.plain').Unsupported"),
})  # fmt: skip
DEATHS = [Case(case.name, case.program, (*case.statuses, "rejected", "timeout", "memory")) for case in DEATHS]

UNSUPPORTED = _group("value", ("unsupported_value",), {
    "int subclass": "class I(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\ndef f(x):\n    return I(3)\n",
    "str subclass": "class S(str):\n    def __repr__(self): return '42'\ndef f(x):\n    return S('x')\n",
    "list subclass": "class L(list): pass\ndef f(x):\n    return [L()]\n",
    "dict subclass": "class D(dict): pass\ndef f(x):\n    return D()\n",
    "lying repr": "class A:\n    def __repr__(self): return '42'\ndef f(x):\n    return A()\n",
    "equal to all": "class A:\n    def __eq__(self, o): return True\n    def __hash__(self): return 0\ndef f(x):\n    return {A(): 1}\n",
    "lying class": "class A:\n    __class__ = int\ndef f(x):\n    return A()\n",
    "counter": _f("import collections\nreturn collections.Counter('aab')"),
    "defaultdict": _f("import collections\nreturn collections.defaultdict(int)"),
    "deque": _f("import collections\nreturn collections.deque([1])"),
    "ordered dict": _f("import collections\nreturn collections.OrderedDict(a=1)"),
    "named tuple": _f("import collections\nreturn collections.namedtuple('P', 'x')(1)"),
    "enum": _f("import enum\nreturn enum.IntEnum('C', 'a').a"),
    "range": _f("return range(3)"),
    "generator": _f("return (i for i in range(3))"),
    "iterator": _f("return iter([1])"),
    "dict view": _f("return {1: 2}.keys()"),
    "function": _f("return f"),
    "class": _f("return int"),
    "exception": _f("return ValueError('x')"),
    "ellipsis": _f("return ..."),
    "not implemented": _f("return NotImplemented"),
    "bytearray": _f("return bytearray(b'x')"),
    "memoryview": _f("return memoryview(b'x')"),
    "module": _f("import math\nreturn math"),
    "decimal": _f("import decimal\nreturn decimal.Decimal('1.5')"),
    "nested": _f("return {'a': [1, (2, {3: f})]}"),
    "bool metaclass": "class M(type):\n    def __instancecheck__(c, o): return True\nclass B(metaclass=M): pass\ndef f(x):\n    return B()\n",
})  # fmt: skip

TOO_LARGE = _group("large", ("output_limit",), {
    "long string": _f("return 'x' * 5000"),
    "long list": _f("return [0] * 10**6"),
    "wide sharing": _f("a = 'x'\nfor _ in range(40): a = [a, a]\nreturn a"),
    "deep list": _f("a = []\nfor _ in range(500): a = [a]\nreturn a"),
    "cycle": _f("a = []\na.append(a)\nreturn a"),
    "dict cycle": _f("a = {}\na['a'] = a\nreturn a"),
    "huge int": _f("return 10**5000"),
    "huge negative int": _f("return -10**5000"),
    "bytes": _f("return b'x' * 5000"),
    "escapes": _f("return '\\0' * 4000"),
    "set": _f("return set(range(10**5))"),
})  # fmt: skip

PATCHES = [  # a program that patches what it can reach must not change what its own value is
    Case("patch: len", _f("import builtins\nreturn 1"), ("error",)),
    Case("patch: repr", _reach("b = reach('builtins')\nb.repr = lambda v: '666'\nreturn [1]"), ("ok", "error"), "[1]"),
    Case("patch: type", _reach("reach('builtins').type = int\nreturn [1]"), ("ok", "error"), "[1]"),
    Case("patch: len by globals", _f("__builtins__.len = lambda v: 0\nreturn [1, 2]"), ("ok",), "[1, 2]"),
    Case("patch: exec", _f("__builtins__.exec = None\nreturn 3"), ("ok",), "3"),
    Case("patch: BaseException", _f("__builtins__.BaseException = int\nraise ValueError"), ("error",)),
    Case("patch: encode", _reach("loaded('azr_jax.executor.child').encode = None\nreturn 4"), ("ok", "error"), "4"),
    Case("patch: os.write", _reach("loaded('os').write = None\nreturn 5"), ("ok", "error"), "5"),
    Case("patch: constant", _f("f.__defaults__ = (1,)\nreturn 6"), ("ok",), "6"),
]  # fmt: skip

FORGERIES = _group("forgery", ("ok", "crashed", "error", "output_limit", "timeout"), {
    "frame flood": _reach("p = reach('posix')\nfor _ in range(10**6): p.write(3, b'V' * 4096)\nreturn 1"),
    "bad length": _reach("reach('posix').write(3, b'\\xff' * 64)\nreturn 1"),
    "done at once": _reach("reach('posix').write(3, b'\\0\\0\\0\\1D')\nreturn 1"),
    "unknown tag": _reach("reach('posix').write(3, b'\\0\\0\\0\\2Zx')\nreturn 1"),
    "bad value": _reach("reach('posix').write(3, b'\\0\\0\\0\\7V__x__()')\nreturn 1"),
    "bad utf-8": _reach("reach('posix').write(3, b'\\0\\0\\0\\3V\\xff\\xfe')\nreturn 1"),
    "half a frame": _reach("p = reach('posix')\np.write(3, b'\\0\\0\\0\\x09V1')\np._exit(0)"),
    "value then exit": _reach("p = reach('posix')\np.write(3, b'\\0\\0\\0\\2V1')\np._exit(0)"),
    "close the socket": _reach("reach('posix').close(3)\nreturn 1"),
    "empty frame": _reach("reach('posix').write(3, b'\\0\\0\\0\\0')\nreturn 1"),
})  # fmt: skip

INSPECTION = _group("inspection", ("ok", "error", "unsupported_value", "crashed", "output_limit"), {
    "frames": _reach("s = loaded('sys')\nframe = s._getframe()\nseen = []\nwhile frame:\n    seen += [str(v)[:20] for v in frame.f_locals.values() if 'GOLD' in str(v)]\n    frame = frame.f_back\nreturn seen"),
    "traceback frames": _f("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    frame = e.__traceback__.tb_frame\nreturn sorted(frame.f_back.f_locals)[:3]"),
    "gc objects": _reach("return any('GOLD' in o for o in reach('gc').get_objects() if type(o) is str)"),
    "all modules": _reach("return sorted(loaded('sys').modules)[:3]"),
})  # fmt: skip

CASES: list[Case] = [
    *PROCESSES, *FILES, *NETWORK, *HIDDEN, *MEMORY, *SPINS, *SLEEPS, *DEATHS, *UNSUPPORTED, *TOO_LARGE, *PATCHES,
    *FORGERIES, *INSPECTION,
]  # fmt: skip
