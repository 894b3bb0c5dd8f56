"""Compiles a run's programs for a TPU slice without one, or for this CPU, and reads off what a chip would hold.

The programs are the run's own (`rollout.device.Device`, `learn.step.make_update`), lowered for shapes: no weights
exist. The TPU compiler is libtpu's, so its bytes are those of a chip. Results are kept, each program by itself, in
`cache_folder()`, keyed by versions, sources, shapes, config and topology: a plan that was interrupted goes on where it
was. Nothing is run and no time is measured.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from azr_jax.chips import GIB
from azr_jax.dist.mesh import make_mesh, row_sharding
from azr_jax.errors import UserError
from azr_jax.learn.packing import pack
from azr_jax.learn.state import init_state, param_shardings, state_shardings
from azr_jax.learn.step import make_update
from azr_jax.models.attention import attend
from azr_jax.models.transformer import init_params
from azr_jax.plan_collectives import collectives
from azr_jax.plan_estimate import Setup
from azr_jax.rollout.device import Device
from azr_jax.rollout.weights import decode_mesh

log = logging.getLogger(__name__)

CACHE_VARIABLE = "AZR_JAX_CACHE_DIR"
BEAT = 30.0  # seconds between two signs of life
PACKAGE = Path(__file__).parent
#: Parts whose code decides what is compiled.
SOURCES = ("dist/mesh.py", "dist/sequence.py", "learn", "models", "rollout", "plan_compile.py", "plan_collectives.py")
#: What a compiler says of a program that it finds too large: "that 20.5G are needed" of "15.75G".
TOO_LARGE = re.compile(r"(?:total memory required[^(]*\(|[Uu]sed )([\d.]+)([KMGT])")
UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def cache_folder() -> Path:
    """Where results are kept: $AZR_JAX_CACHE_DIR, or azr_jax/plan in the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(given).expanduser() if given else Path(user).expanduser() / "azr_jax" / "plan"


def require_compiler(setup: Setup) -> None:
    """UserError if the target is a TPU and its compiler is not installed."""
    if setup.target.chip.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"planning for {setup.target.name} needs the TPU compiler, which is not installed (no TPU is needed): "
            f'{sys.executable} -m pip install -e ".[tpu]" in the folder of this project'
        )


def compiled(setup: Setup, program: str) -> dict[str, Any]:
    """A program's memory a chip in bytes (argument, temp, output, alias), collectives and seconds of compiling.

    A program too large for the chip has `needed_bytes` as its compiler states them, and no other bytes.
    UserError: the compiler refuses it for another reason.
    """
    path = cache_folder() / f"{_key(setup, program)}.json"
    found = _read(path)
    if found is None:
        found = _compile(setup, program)
        _write(path, found)
        return found | {"cached": False}
    return found | {"cached": True}


def _compile(setup: Setup, program: str) -> dict[str, Any]:
    start = time.monotonic()
    with _alive(f"compiling {program} for {setup.target.name}"):
        lowered = lower(setup, program)
        try:
            with _ended_by_signals():
                done, text = compile_to_text(lowered)
        except jax.errors.JaxRuntimeError as error:
            too_large = TOO_LARGE.search(str(error)) if "RESOURCE_EXHAUSTED" in str(error) else None
            if too_large is None:
                first = str(error).strip().splitlines()[0]
                raise UserError(f"{setup.target.name} cannot compile {program}: {first}") from None
            found: dict[str, Any] = {"needed_bytes": float(too_large[1]) * UNITS[too_large[2]]}
            return found | {"collectives": None, "compile_seconds": time.monotonic() - start}
    parts = {f"{part}_bytes": size for part, size in memory_of(done, setup.target.chip.platform).items()}
    return parts | {"collectives": collectives(text), "compile_seconds": round(time.monotonic() - start, 1)}


def memory_of(done: Any, platform: str) -> dict[str, int]:
    """Bytes a chip of a compiled program: argument, temp, output, alias (outputs in an argument's memory).

    For a TPU, temporaries follow from the peak, by which its compiler decides whether a program is too large: libtpu
    0.0.42 gives them with a part of the aliased outputs added. Peaks of other platforms leave temporaries out.
    """
    memory = done.memory_analysis()
    parts = {part: int(getattr(memory, f"{part}_size_in_bytes")) for part in ("argument", "temp", "output", "alias")}
    if platform == "tpu" and memory.peak_memory_in_bytes:  # 0: it does not say
        parts["temp"] = int(memory.peak_memory_in_bytes) - parts["argument"] - parts["output"] + parts["alias"]
    return parts


def compile_to_text(lowered: Any) -> tuple[Any, str]:
    """A compiled program, and its optimized HLO as the compiler itself writes it down.

    `as_text` is jaxlib's, which cannot read all instructions of a newer libtpu. JAX's cache of compiled programs is
    left out: one that comes from there is not written down, and one for a TPU that is not here cannot be loaded.
    """
    caching = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
            written = Path(folder).glob("*after_optimizations.txt")
            return done, max(written, key=lambda path: path.stat().st_size).read_text()
    finally:
        jax.config.update("jax_enable_compilation_cache", caching)


def lower(setup: Setup, program: str) -> Any:
    """A program (of `PROGRAMS`) traced for the shapes and places of its arguments on the target's own devices."""
    if program == "update":
        return _lower_update(setup)
    rollout = replace(setup.config.rollout, cache_gb=(setup.cache * 1.0001) / GIB)
    mesh = decode_mesh(setup.model, _devices(setup, setup.target.host_name if _is_tpu(setup) else ""))
    device = Device(setup.model, rollout, mesh, setup.slots, frozenset({0, 1}), setup.attention, setup.dtype)
    size = device.buckets[-1] if program == "prefill" else device.widths[-1]
    return device.lower(program, size)


def _lower_update(setup: Setup) -> Any:
    config, model = setup.config, setup.model
    mesh = make_mesh(config.mesh, _devices(setup, setup.target.name))
    state = jax.eval_shape(lambda: init_state(init_params(model, 0), config, model, mesh))
    layout = state_shardings(config, model, mesh)
    state = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, layout)
    split = row_sharding(mesh, leading=1)
    batch = {
        name: jax.ShapeDtypeStruct((setup.micro_batches_at_most, *x.shape[1:]), x.dtype, sharding=split)
        for name, x in vars(pack([], [], setup.row_tokens, setup.rows, 1)).items()
        if isinstance(x, np.ndarray)
    }
    reference = None
    if config.learn.kl != "none":
        reference = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, jnp.dtype(setup.dtype), sharding=where),
            state.params,
            param_shardings(model, mesh),
        )
    how = partial(attend, kind=setup.attention, mesh=mesh)
    update = make_update(config, model, mesh, attend=how).compiled  # type: ignore[attr-defined]
    return update.lower(state, batch, np.int32(1), np.float32(1), reference)


def _is_tpu(setup: Setup) -> bool:
    return setup.target.chip.platform == "tpu"


def _devices(setup: Setup, topology: str) -> Any:
    if not _is_tpu(setup):
        return jax.devices("cpu")[:1]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # plans, and a run, may be side by side
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # of a machine without a TPU: libtpu complains at length
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # where there is neither
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process at once. Python would wait for the compiler, and libtpu print its stack."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not one of Python's, such as libtpu's


@contextmanager
def _alive(what: str) -> Iterator[None]:
    """Say that something has begun, and every half minute that it still goes on."""
    log.info("%s", what)
    done, start = threading.Event(), time.monotonic()

    def beat() -> None:
        while not done.wait(BEAT):
            log.info("%s: %.0f s so far", what, time.monotonic() - start)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _key(setup: Setup, program: str) -> str:
    """Of everything that the result depends on."""
    config = setup.config
    sources = hashlib.sha256()
    for part in SOURCES:
        path = PACKAGE / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            sources.update(file.read_bytes())
    learn = asdict(config.learn) | {"lr": 0.0, "weight_decay": 0.0} if program == "update" else {}
    parts = {
        "program": program,
        "versions": versions(),
        "sources": sources.hexdigest(),
        "model": asdict(setup.model),
        "topology": setup.target.name if program == "update" else (setup.target.chip.name, setup.target.host_chips),
        "shapes": [setup.slots, setup.row_tokens, setup.rows, setup.micro_batches_at_most, setup.layout, setup.dtype],
        "attention": setup.attention,
        "learn": learn,
        "rollout": asdict(config.rollout),
        "mesh": asdict(config.mesh) if program == "update" else {},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def versions() -> dict[str, str]:
    """Of what compiles."""
    names = ("jax", "jaxlib", "libtpu")
    return {name: metadata.version(name) for name in names if importlib.util.find_spec(name)}


def _read(path: Path) -> dict[str, Any] | None:
    """A result kept earlier; None if there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, found: dict[str, Any]) -> None:
    """Keep a result; a folder that cannot be written costs a line in the log."""
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(found))
        part.replace(path)
    except OSError as error:
        log.warning("the result is not kept in %s (%s); %s names another folder", path.parent, error, CACHE_VARIABLE)
