"""Checkpoints: bit-exact, resharded, atomic under SIGKILL, and never wrong when files are damaged."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from azr_jax.checkpoint import Checkpointer, best_step
from azr_jax.errors import UserError
from azr_jax.storage import may_be_whole

ROOT = Path(__file__).parents[1]
EXTRA = {"text": "\ud800\u00e9", "tenth": 0.1, "nan": float("nan"), "rows": [[1, [2, None]], {"b": 1, "a": True}]}


def mesh_of(count: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:count]), ("fsdp",))


def make_state(mesh: Mesh, seed: int = 0) -> dict:
    """Odd values on purpose: NaN with a payload, signed zeros, subnormals, infinities."""
    weights = jax.random.normal(jax.random.key(seed), (64, 24))
    odd = np.array([0x7FC01234, 0x80000000, 0x00000001, 0x7F800000, 0xFF800000], np.uint32).view(np.float32)
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("fsdp"))
    return {
        "params": {"w": jax.device_put(weights, rows), "half": jax.device_put(weights.astype(jnp.bfloat16), rows)},
        "odd": jax.device_put(odd, whole),
        "step": jax.device_put(jnp.int32(seed), whole),
        "key": jax.device_put(jax.random.key_data(jax.random.key(seed)), whole),
        "mask": jax.device_put(jnp.array([True, False]), whole),
    }


def abstract(mesh: Mesh) -> dict:
    """make_state's shapes, on another mesh."""
    specs = {leaf.shape: P("fsdp") if leaf.ndim == 2 else P() for leaf in jax.tree.leaves(make_state(mesh_of(1)))}
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs[x.shape])),
        make_state(mesh_of(1)),
    )


def save(keeper: Checkpointer, step: int, state: Any, extra: dict, best: int | None = None) -> None:
    keeper.save(step, state, extra, best)
    keeper.wait()


def bits(state) -> list[tuple[str, bytes]]:
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize(("saved_on", "restored_on"), [(8, 8), (8, 4), (4, 8), (1, 8), (8, 1)])
def test_exact_on_any_mesh(tmp_path, saved_on, restored_on):
    keeper = Checkpointer(tmp_path / "checkpoints", keep=2)
    state = make_state(mesh_of(saved_on))
    save(keeper, 7, state, EXTRA)
    found = Checkpointer(tmp_path / "checkpoints", keep=2).restore(abstract(mesh_of(restored_on)))
    assert found is not None
    step, restored, extra = found
    assert step == 7 and bits(restored) == bits(state)
    assert repr(extra) == repr(EXTRA), "also the order of keys; nan is not equal to itself, its text is"
    assert restored["params"]["w"].sharding == NamedSharding(mesh_of(restored_on), P("fsdp"))
    assert len(restored["params"]["w"].sharding.device_set) == restored_on


def test_arrays_in_host_memory(tmp_path):
    """Offloaded moments beside weights on the devices: saved, checked and brought back to where they were."""
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("x",))
    there = NamedSharding(mesh, P("x"))
    away = there.with_memory_kind("pinned_host")
    values = np.arange(32, dtype=np.float32)
    state = {"w": jax.device_put(values, there), "m": jax.device_put(2 * values, away)}
    keeper = Checkpointer(tmp_path, keep=1)
    save(keeper, 3, state, {"n": 1})
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    found = keeper.restore(like)
    assert found is not None and found[0] == 3
    assert {name: leaf.sharding.memory_kind for name, leaf in found[1].items()} == {"w": "device", "m": "pinned_host"}
    np.testing.assert_array_equal(found[1]["m"], 2 * values)


def test_nothing_saved_yet(tmp_path):
    keeper = Checkpointer(tmp_path / "none", keep=1)
    assert keeper.latest() is None and keeper.restore(abstract(mesh_of(1))) is None
    assert not (tmp_path / "none").exists()


def test_keeps_the_newest(tmp_path):
    keeper = Checkpointer(tmp_path, keep=2)
    for step in (1, 2, 10, 1_000_000):
        save(keeper, step, make_state(mesh_of(2), step), {"step": step})
    assert keeper.steps() == [10, 1_000_000] and keeper.latest() == 1_000_000
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_000010", "step_1000000"]
    save(keeper, 1_000_000, make_state(mesh_of(2), 5), {"again": True})
    found = keeper.restore(abstract(mesh_of(2)))
    assert found is not None and int(found[1]["step"]) == 5 and found[2] == {"again": True}


def test_keeps_the_best_as_long_as_it_is_said_to_be(tmp_path):
    keeper = Checkpointer(tmp_path, keep=2)
    for step in range(1, 6):
        save(keeper, step, make_state(mesh_of(1)), {}, best=1 if step < 4 else 2)
        assert keeper.steps() == [[1], [1, 2], [1, 2, 3], [2, 3, 4], [2, 4, 5]][step - 1]


def test_the_best_has_the_highest_score_and_is_the_earlier_of_equals():
    scores = {0: 0.1, 3: 0.4, 6: 0.4, 9: 0.3}
    assert best_step(scores, [0, 3, 6, 9, 10]) == 3 and best_step(scores, [10, 6, 0]) == 6
    assert best_step(scores, [10]) is None and best_step({}, [1]) is None


def test_what_was_saved_may_be_donated_at_once(tmp_path):
    """The copy is complete when `save` returns: an update that reuses the buffers does not reach what is written."""
    shift = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    place = NamedSharding(mesh_of(4), P("fsdp"))
    keeper = Checkpointer(tmp_path, keep=1)
    for step in range(5):
        state = {"w": jax.device_put(jnp.full((512, 1024), step, jnp.float32), place)}
        keeper.save(step, state, {})
        for _ in range(3):
            state = shift(state)
        jax.block_until_ready(state)
        keeper.wait()
        found = keeper.restore(state)
        assert found is not None and found[0] == step
        np.testing.assert_array_equal(found[1]["w"], np.full((512, 1024), step, np.float32))


def test_a_save_that_fails_for_any_reason_removes_nothing(tmp_path, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no room for the copy")

    with pytest.raises(MemoryError), Checkpointer(tmp_path, 1) as keeper:
        save(keeper, 1, make_state(mesh_of(1)), {})
        keeper.wait()
        monkeypatch.setattr(keeper._orbax, "save", fail)
        keeper.save(2, make_state(mesh_of(1)), {})
    assert Checkpointer(tmp_path, 1).steps() == [1]
    keeper._under_way = 2  # a thread of Orbax failed, and told somebody else
    keeper.wait()
    assert keeper.steps() == [1]


def test_saves_do_not_overlap_and_leaving_waits(tmp_path):
    with Checkpointer(tmp_path, keep=2) as keeper:
        for step in (1, 2, 3):
            keeper.save(step, make_state(mesh_of(2), step), {"step": step})
            assert set(range(1, step)) & set(keeper.steps()) == set(range(max(1, step - 2), step)), "complete by now"
    assert keeper.steps() == [2, 3] and not keeper.saving
    keeper.poll()  # nothing to tell


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how.startswith("truncated"):
        keep = {"truncated to a byte": 1, "truncated by a byte": len(data) - 1, "truncated": len(data) // 2}[how]
        path.write_bytes(data[:keep])
    elif how == "zeroed":
        path.write_bytes(bytes(len(data)))
    elif how == "one bit":
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        path.write_bytes(bytes(flipped))


CUTS = ["truncated to a byte", "truncated", "truncated by a byte"]


@pytest.mark.parametrize("how", ["deleted", *CUTS, "zeroed", "one bit"])
def test_whatever_file_is_damaged_the_state_restored_is_one_that_was_saved(tmp_path, how, caplog, capfd):
    """Each file of the newest checkpoint in turn: it is read right, or skipped with a warning for the older one."""
    keeper = Checkpointer(tmp_path, keep=3)
    saved = {step: make_state(mesh_of(4), step) for step in (1, 2)}
    for step, state in saved.items():
        save(keeper, step, state, {"step": step, "buffer": ["x" * 50]})
    skipped = 0
    for path in sorted(entry for entry in keeper.path(2).rglob("*") if entry.is_file()):
        intact = path.read_bytes()
        damage(path, how)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = keeper.restore(abstract(mesh_of(4)))
        assert found is not None
        step, state, extra = found
        assert bits(state) == bits(saved[step]) and extra["step"] == step, path
        assert (step == 1) == ("skipping checkpoint" in caplog.text), path
        assert len(caplog.messages) == (step == 1) and not any("\n" in message for message in caplog.messages)
        skipped += step == 1
        path.write_bytes(intact)
    assert skipped >= 3, "arrays, their index and the JSON part at least"
    output = capfd.readouterr()
    assert "Traceback" not in output.err + output.out, "one clear line, no pages"


def test_going_on_after_a_damaged_newest_one(tmp_path):
    keeper = Checkpointer(tmp_path, keep=2)
    for step in (4, 8):
        save(keeper, step, make_state(mesh_of(1), step), {})
    damage(keeper.path(8) / "extra/metadata", "truncated")
    found = keeper.restore(abstract(mesh_of(1)))
    assert found is not None and found[0] == 4
    save(keeper, 6, make_state(mesh_of(1), 6), {})  # stopped before it reached 8 again
    assert keeper.steps() == [4, 6], "the damaged one is gone, the good ones are not"


def test_no_readable_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
    keeper = Checkpointer(tmp_path, keep=2)
    for step in (1, 2):
        save(keeper, step, make_state(mesh_of(1)), {})
        damage(keeper.path(step) / "extra/metadata", "zeroed")
    with pytest.raises(UserError, match=r"none of the 2 checkpoints .* can be read \(steps 1, 2\)"):
        keeper.restore(abstract(mesh_of(1)))


READ_AS_OTHER = """
import os, sys
import jax, jax.numpy as jnp
from azr_jax.checkpoint import Checkpointer
from azr_jax.errors import UserError
from azr_jax.storage import may_be_whole

os.setgid(65534)
os.setuid(65534)
try:
    Checkpointer(sys.argv[1], keep=3).restore({"w": jnp.zeros((64, 64))})
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody who may not read")
def test_what_may_not_be_read_is_not_taken_for_damage():
    """An older one in its place would in time be the reason to remove it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        with Checkpointer(Path(folder) / "c", keep=3) as keeper:
            for step in (1, 2):
                save(keeper, step, {"w": jnp.full((64, 64), float(step))}, {})
        for path in (Path(folder) / "c/step_000002/state").rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)
        done = subprocess.run([sys.executable, "-c", READ_AS_OTHER, f"{folder}/c"], capture_output=True, text=True)
    assert done.returncode == 1 and "step_000002" in done.stderr, done.stderr
    assert "may be whole, so no older one is taken" in done.stderr and "ermission" in done.stderr


TENSORSTORE = "Error reading local file: Failed to read [OS error {}: E]"


@pytest.mark.parametrize(
    ("error", "whole"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (MemoryError(), True),
        (ValueError("UNKNOWN: " + TENSORSTORE.format(errno.EIO)), True),
        (ValueError("PERMISSION_DENIED: " + TENSORSTORE.format(errno.EACCES)), True),
        (ValueError("UNAVAILABLE: the bucket does not answer"), True),
        (ValueError("NOT_FOUND: " + TENSORSTORE.format(errno.ENOENT)), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (ValueError("DATA_LOSS: Error decoding chunk"), False),
        (json.JSONDecodeError("Expecting value", "x", 0), False),
        (KeyError("leaves"), False),
    ],
    ids=repr,
)
def test_errors_that_say_nothing_of_the_content(error, whole):
    assert may_be_whole(error) is whole
    wrapped = RuntimeError("while reading")
    wrapped.__cause__ = error
    assert may_be_whole(wrapped) is whole


def test_another_model_is_named_not_skipped(tmp_path):
    keeper = Checkpointer(tmp_path, keep=2)
    save(keeper, 1, make_state(mesh_of(1)), {})
    other = abstract(mesh_of(1))
    other["params"]["w"] = jax.ShapeDtypeStruct((64, 25), jnp.float32)
    with pytest.raises(UserError, match=r"\['params'\]\['w'\] is float32\[64, 24\] there and float32\[64, 25\] here"):
        keeper.restore(other)
    other = abstract(mesh_of(1))
    del other["mask"]
    with pytest.raises(UserError, match=r"\['mask'\] is bool\[2\] there and absent here"):
        keeper.restore(other)


def test_exchanged_and_moved_elements_change_the_fingerprint(tmp_path):
    """What a sum without positions would not notice."""
    from azr_jax.fingerprints import fingerprints

    x = np.arange(1, 25, dtype=np.float32).reshape(4, 6)
    marks = [fingerprints([jnp.asarray(y)])[0] for y in (x, x[::-1], x[:, ::-1], np.roll(x, 1), np.roll(x, 1, axis=0))]
    assert len(set(marks)) == len(marks)
    sharded = jax.device_put(jnp.asarray(x), NamedSharding(mesh_of(2), P("fsdp")))
    assert fingerprints([sharded, jnp.zeros(3), jnp.zeros((0,))]) == [marks[0], 0, 0]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", Path("/proc/azr_jax_checkpoints")):
        with pytest.raises(UserError, match="cannot write a checkpoint to .*no checkpoint exists yet") as caught:
            save(Checkpointer(folder, keep=1), 1, make_state(mesh_of(1)), {})
        assert str(folder) in str(caught.value)
    with pytest.raises(UserError, match="at least 1"):
        Checkpointer(tmp_path, keep=0)
    with pytest.raises(TypeError):
        save(Checkpointer(tmp_path, keep=1), 1, make_state(mesh_of(1)), {"no": object()})


CHILD = """
import resource, signal, sys
import jax.numpy as jnp
from azr_jax.checkpoint import Checkpointer
from azr_jax.errors import UserError
keeper = Checkpointer(sys.argv[1], keep=2)
state = lambda step: {"w": jnp.full((256, 1024), step, jnp.float32), "n": jnp.int32(step)}
if sys.argv[2] == "full":
    with keeper:
        keeper.save(1, state(1), {"step": 1})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    keeper.save(2, {"w": jnp.arange(2**18, dtype=jnp.float32) ** 0.5}, {})
    try:
        keeper.wait()
    except UserError as error:
        print(error)
else:
    for step in range(1, 10**6):
        keeper.save(step, state(step), {"step": step})  # the one before is complete
        print(step - 1, flush=True)
"""


def child(folder: Path, mode: str) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(folder), mode]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_disk_that_fills_up(tmp_path):
    """A limit on the size of files stands in for it: the same failing write, deep inside the array storage."""
    output, errors = child(tmp_path, "full").communicate()
    assert "cannot write a checkpoint" in output and "step 1 is untouched" in output
    assert "Traceback" not in errors
    keeper = Checkpointer(tmp_path, keep=2)
    assert keeper.steps() == [1]
    save(keeper, 3, make_state(mesh_of(1)), {})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_000001", "step_000003"], "nothing half-written"


@pytest.mark.parametrize("delay", [0.0, 0.007, 0.013])
def test_sigkill_while_saving(tmp_path, delay):
    saver = child(tmp_path, "forever")
    assert saver.stdout is not None and saver.stderr is not None
    for _ in range(5):
        last = int(saver.stdout.readline())
    time.sleep(delay)
    os.kill(saver.pid, signal.SIGKILL)
    rest = saver.communicate()[0].split()
    last = int(rest[-1]) if rest else last
    keeper = Checkpointer(tmp_path, keep=2)
    like = {"w": jnp.zeros((256, 1024)), "n": jnp.int32(0)}
    found = keeper.restore(like)
    assert found is not None
    step, state, extra = found
    assert last <= step <= last + 2 and extra == {"step": step}
    assert int(state["n"]) == step and bool((state["w"] == step).all())
    save(keeper, step + 1, like, {})
    assert len(list(tmp_path.iterdir())) == 2, "leftovers of the killed save are cleared away"
