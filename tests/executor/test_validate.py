# ruff: noqa: E501 - one program a line
"""The gate for proposals: what passes is literal, complete and the same everywhere; every refusal has a reason."""

from __future__ import annotations

import pytest

from azr_jax.executor import Request
from azr_jax.executor.sharing import shareable
from azr_jax.executor.suspicion import holds_set, suspicious


def validate(pool, program, *inputs, many=()):
    return pool.run_all([Request("v", "validate", program=program, input=",".join(inputs), inputs=many)])[0]


@pytest.mark.parametrize(
    ("program", "arguments", "output"),
    [
        ("def f(x):\n    return x", "1", "1"),
        ("def f(x):\n    return None", "1", "None"),
        ("def f(x):\n    print('noise' * 10**5)\n    return x", "1", "1"),
        ("def f():\n    return 'none needed'", "", "'none needed'"),
        ("def f(a, b=2, *, c):\n    return [a, b, c]", "1, c={3}", "[1, 2, {3}]"),
        ("def f(x):\n    x.append(1)\n    return x", "[0]", "[0, 1]"),
        ("def f(x):\n    return {c for c in x}", "'hello'", "{'e', 'h', 'l', 'o'}"),
        ("def f(x):\n    return sorted({c for c in x})", "'hello'", "['e', 'h', 'l', 'o']"),
        ("import math, re, collections\ndef f(x):\n    return [math.pi, re.sub('a', 'b', x)]", "'a'", "[3.141592653589793, 'b']"),
        ("from collections import Counter\ndef f(x):\n    return dict(Counter(x))", "'aab'", "{'a': 2, 'b': 1}"),
        ("from queue import Queue\ndef f(x):\n    q = Queue()\n    q.put(x)\n    return q.get()", "3", "3"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef f(x):\n    return P(x).x", "3", "3"),
        ("from functools import cached_property\nclass A:\n    @cached_property\n    def v(self): return 4\ndef f(x):\n    return A().v", "3", "4"),
        ("from typing import List\nimport statistics\ndef f(x: List[int]):\n    return statistics.mean(x)", "[1, 3]", "2"),
        ("def f(x):\n    return [float('nan'), 1e999, -1e999, 1j]", "1", "[float('nan'), float('inf'), float('-inf'), 1j]"),
        ("def f(x):\n    return '\\ud800é\\n'", "1", "'\\ud800é\\n'"),
        ("def f(x):\n    class K:\n        def g(self): return x\n    return K().g()", "1", "1"),
        ("def f(x):\n    return x.encode('utf-16-le') + '\\N{BULLET}'.encode()", "'a'", "b'a\\x00\\xe2\\x80\\xa2'"),
    ],
)  # fmt: skip
def test_valid(program, arguments, output, pool):
    verdict = validate(pool, program, arguments)
    assert (verdict.status, verdict.output) == ("ok", output)


@pytest.mark.parametrize(
    ("program", "arguments", "status", "reason"),
    [
        ("def f(x) return x", "1", "syntax_error", "syntax_error"),
        ("def f(x):\n    return\n  x", "1", "syntax_error", "syntax_error"),
        ("return 1\ndef f(x):\n    return x", "1", "syntax_error", ""),
        ("def g(x):\n    return x", "1", "rejected", "no_f"),
        ("import os\ndef f(x):\n    return x", "1", "rejected", "banned_module:os"),
        ("def f(x):\n    return ().__class__.__base__.__subclasses__()", "1", "rejected", "banned_name:__subclasses__"),
        ("def f(x):\n    return x", "g(1)", "rejected", "bad_input"),
        ("def f(x):\n    return x", "*[1]", "rejected", "bad_input"),
        ("def f(x):\n    return x", "1) or f(2", "rejected", "bad_input"),
        ("def f(x):\n    return x" + " " * 40_000, "1", "rejected", "too_long"),
        ("def f(x):\n    return 1 / 0", "1", "error", ""),
        ("def f(x):\n    return x", "", "error", ""),
        ("def f(x):\n    return lambda: 1", "1", "unsupported_value", ""),
        ("def f(x):\n    return 'x' * 10_000", "1", "output_limit", ""),
        ("def f(x):\n    while True: pass", "1", "timeout", "cpu"),
        ("def f(x):\n    return [0] * 10**11", "1", "memory", ""),
    ],
)  # fmt: skip
def test_refused(program, arguments, status, reason, pool):
    verdict = validate(pool, program, arguments)
    assert (verdict.status, verdict.reason) == (status, reason), verdict
    assert verdict.output == ""


#: Programs that a policy could use as a coin: each must be caught although two runs may agree by luck.
COINS = [
    "def f(x):\n    return hash(str(x)) % 64",  # of two sides, eight runs agree once in 128
    "def f(x):\n    return id(str(x) * 9) // 16 % 64",
    "def f(x):\n    return id([]) // 16 % 64",
    "def f(x):\n    return list({str(i) for i in range(5)})",
    "def f(x):\n    s = {'a', 'b', 'c', 'd'}\n    return s.pop()",
    "def f(x):\n    return ''.join(set('hello'))",
    "def f(x):\n    return {k: 1 for k in {'a', 'b', 'c', 'd', 'e'}}.popitem()",
    "def f(x):\n    return str(object())",
    "def f(x):\n    return repr(f)",
    "def f(x):\n    return str(map(int, []))",
    "def f(x):\n    return f'{f!r}'[-4:]",
    "class A: pass\ndef f(x):\n    return str(A())[-3:]",
    "def f(x):\n    return list({'a': 1, 'b': 2, 'c': 3}.keys() - {'b'} | {'d', 'e'}.__class__(['x', 'y']))",
    "def f(x):\n    return max(frozenset(['p', 'q', 'r']), key=hash)",
]


def test_chance_is_refused(pool):
    for program, verdict in zip(COINS, [validate(pool, program, "1") for program in COINS], strict=True):
        assert verdict.status in ("nondeterministic", "rejected"), (program, verdict)


def test_every_input_must_pass(pool):
    program = "def f(x):\n    return 10 // x"
    assert validate(pool, program, many=("1", "2", "5")).outputs == ("10", "5", "2")
    verdict = validate(pool, program, many=("1", "0", "5"))
    assert (verdict.status, verdict.error_type, verdict.outputs) == ("error", "ZeroDivisionError", ())
    assert validate(pool, program, many=("1", "x", "5")).reason == "bad_input"
    loop = "def f(x):\n    while x == 2: pass\n    return x"
    assert validate(pool, loop, many=("1", "2", "3")).status == "timeout"


def test_output_is_the_first_calls_value_whatever_the_order(pool):
    program = "seen = []\ndef f(x):\n    seen.append(x)\n    return len(seen)"
    assert validate(pool, program, many=("1", "2", "3")).outputs == ("1", "1", "1")


def test_equal_dicts_in_another_order_are_the_same_value(pool):
    verdict = validate(pool, "def f(x):\n    return {k: len(k) for k in {'a', 'bb', 'ccc', 'dddd'}}", "1")
    assert verdict.status == "ok"


def test_shareable_is_conservative():
    for program in (
        "def f(x):\n    return x + 1",
        "import math\nfrom collections import Counter\ndef f(x):\n    return math.sqrt(len(Counter(x)))",
        "class A:\n    def __init__(self, v):\n        self.v = v\ndef f(x):\n    return A(x).v",
        "def f(x):\n    global n\n    n = x\n    return n",
    ):
        assert shareable(program)
    for program in (
        "import math\ndef f(x):\n    math.n = 1\n    return 1",
        "from collections import Counter as C\ndef f(x):\n    C.n = 1\n    return 1",
        "import re\ndef f(x):\n    return 1",
        "import decimal\ndef f(x):\n    return 1",
        "def f(x):\n    return __builtins__",
        "def f(x):\n    setattr(f, 'a', 1)\n    return 1",
        "def f(x):\n    return f.__globals__",
        "def f(x):\n    return (i for i in x).gi_frame.f_builtins",
        "def f(x):\n    exec('import math; math.n = 1')\n    return 1",
        "def f(x",
    ):
        assert not shareable(program)


#: Ways to an address or an order that mention neither.
HIDDEN_COINS = [
    "def f(x):\n    return int(str(f)[-3], 16) % 2",
    "def g():\n    yield 1\ndef f(x):\n    return f'{g()}'[-2]",
    "def f(x):\n    return '%s' % (lambda: 0)",
    "def f(x):\n    h = lambda: 0\n    return '{}'.format(h)[-3]",
    "def f(x):\n    return str([].append)[-3]",
    "def f(x):\n    return str(reversed([1]))[-3]",
    "def f(x):\n    return str(enumerate([1]))[-3]",
    "def f(x):\n    return str(max(f, f, key=lambda g: 1))[-3]",
    "from functools import reduce\ndef f(x):\n    return str(reduce(lambda a, b: a, [], f))[-3]",
    "def f(x):\n    return str(next(iter([]), f))[-3]",
    "from itertools import chain\ndef f(x):\n    return str(chain([1]))[-3]",
    "import itertools as i\ndef f(x):\n    return str(i.chain([1]))[-3]",
    "import types\ndef f(x):\n    return str(types.MappingProxyType)[-3]",
    "from collections import defaultdict\ndef f(x):\n    return str(defaultdict(lambda: 0))[-9]",
    "from collections import Counter\ndef f(x):\n    return str(Counter('a').elements())[-3]",
    "def f(x):\n    k = {'a': 1, 'b': 2}.keys()\n    return list(k | {'c': 3})[0]",
    "def f(x):\n    k = dict(a=1, b=2)\n    g = k.items\n    return list(g() ^ [])[0]",
    "def f(x):\n    g = [f]\n    return str(g)[-4]",
    "def f(x):\n    g = []\n    g.append(f)\n    return str(g)[-4]",
    "def f(x):\n    try:\n        return len('a' * x)\n    except MemoryError:\n        return 0",
]
ORDINARY = [
    "def f(x):\n    return [str(i) for i in sorted(x)]",
    "def f(x):\n    return ''.join(str(i) for i in reversed(x))",
    "def f(x):\n    return sorted(x.items(), key=lambda kv: (-kv[1], kv[0]))[:3]",
    "def f(x):\n    d = {}\n    for k, v in zip(x, map(int, x)):\n        d[k] = d.get(k, 0) + v\n    return max(d, key=d.get)",
    "def f(x):\n    a, b = zip(*x)\n    return list(a) + [sum(b)] if any(i in x for i in b) else min(x)",
    "import math\ndef g(n):\n    yield from ()\n".replace("    yield from ()\n", "    return n * math.pi\n")
    + "def f(x):\n    return f'{g(x):.2f}' + ' '.join(map(str, range(x)))",
    "from functools import reduce\ndef f(x):\n    return reduce(lambda a, b: a * b, x, 1)",
    "from itertools import groupby\ndef f(x):\n    return [[k, len(list(g))] for k, g in groupby(x)]",
    "def g(n):\n    while n:\n        yield n\n        n -= 1\ndef f(x):\n    return list(g(x))",
    "def f(x):\n    def inner(n):\n        return n + 1\n    return [inner(i) for i in x]",
    "def f(x):\n    return x\nif __name__ == '__main__':\n    f(1)",
]


def test_suspicious_where_an_order_or_an_address_could_show():
    assert all(map(suspicious, COINS))
    assert [program for program in HIDDEN_COINS if not suspicious(program)] == []
    assert suspicious("def f(x") and suspicious("def f(x):\n    return " + "-" * 100_000 + "1")


def test_ordinary_programs_are_not_suspicious():
    assert [program for program in ORDINARY if suspicious(program)] == []


def test_sets_in_the_input_are_coins_too(pool):
    assert holds_set([((1, {"a": [frozenset()]}), {})]) and holds_set([((), {"k": {1}})])
    assert not holds_set([((1, {"a": [()]}), {"k": "{1}"})])
    program = "def f(x):\n    first = 0\n    for first in x:\n        break\n    return first > 'b'"
    before = pool.stats()["runs"]
    assert validate(pool, program, "{'a', 'b', 'c', 'd'}").status in ("ok", "nondeterministic")
    assert validate(pool, "def f(x):\n    return len(x)", "{'a', 'b'}").status == "ok"
    assert pool.stats()["runs"] - before >= 8 + 2
