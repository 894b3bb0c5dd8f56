"""Runs and checkpoints on a bucket, against a pretended Google Cloud Storage on loopback."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorstore
from etils import epath

from azr_jax import bucket
from azr_jax.bucket import Objects, mount, split
from azr_jax.checkpoint import Checkpointer
from azr_jax.errors import ConfigError, UserError
from azr_jax.telemetry.run_folder import RunFolder
from tests.compiling import xla_flags
from tests.fake_gcs import FakeGcs
from tests.learn.test_two_processes import free_port

ROOT = Path(__file__).parents[1]
PLACE = "gs://bucket/runs/one/checkpoints"


@pytest.fixture(scope="module")
def server() -> Iterator[FakeGcs]:
    """TensorStore reads once a process where the service is."""
    with FakeGcs() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def gcs(server: FakeGcs) -> FakeGcs:
    server.objects.clear()
    server.refuse = None
    return server


def state(step: int) -> dict[str, jax.Array]:
    return {"w": jax.numpy.arange(600.0).reshape(20, 30) + step, "n": jax.numpy.int32(step)}


def test_objects(gcs: FakeGcs) -> None:
    folder = Objects("gs://bucket/a/b/")
    names = [f"rollouts/step_{n:06d}.jsonl" for n in range(120)]
    for name in names:
        folder.write(name, name.encode())
    folder.write("x y%.txt", b"")
    Objects("gs://bucket/a/bc").write("other", b"1")
    assert folder.names() == [*names, "x y%.txt"] and folder.names("rollouts/step_00010") == names[100:110]
    assert dict(folder.read_all(names)) == {name: name.encode() for name in names}
    assert folder.read("x y%.txt") == b"" and folder.read("nothing") is None
    folder.remove([*names, "nothing"])
    assert gcs.names() == ["bucket/a/b/x y%.txt", "bucket/a/bc/other"]


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_only_a_file_that_was_closed_in_order_becomes_an_object(gcs: FakeGcs, mode: str) -> None:
    """Not one that an error interrupted, and not when Python clears away what nobody closed."""
    mount()
    content: Any = "half" if mode == "w" else b"half"
    with epath.Path("gs://bucket/a/whole").open(mode) as file:
        file.write(content)
    with pytest.raises(KeyError), epath.Path("gs://bucket/a/half").open(mode) as file:
        file.write(content)
        raise KeyError
    left = epath.Path("gs://bucket/a/left").open(mode)
    left.write(content)
    del left, file
    gc.collect()
    assert gcs.names() == ["bucket/a/whole"] and gcs.objects["bucket/a/whole"][0] == b"half"


def test_a_write_that_failed_is_not_tried_again_later(gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    mount()
    tried = []

    def write(self: Objects, name: str, content: bytes) -> None:
        tried.append(name)
        raise ValueError("UNAVAILABLE")

    monkeypatch.setattr(Objects, "write", write)
    with pytest.raises(ValueError, match="UNAVAILABLE"), epath.Path("gs://bucket/a/file").open("wb") as file:
        file.write(b"x")
    del file
    gc.collect()
    assert tried == ["file"]


def test_a_bucket_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "PATIENCE_SECONDS", 0.1)
    promise, future = tensorstore.Promise.new()
    monkeypatch.setattr(tensorstore.KvStore, "read", lambda store, key: future)
    with pytest.raises(ValueError, match="DEADLINE_EXCEEDED") as error:
        Objects("gs://bucket/a").names()
    assert "no network?" in (bucket.trouble(error.value) or "")
    promise.set_result(None)


@pytest.mark.parametrize("path", ["gs://", "gs://bucket", "gs://bucket/"])
def test_a_bucket_alone_is_no_run_folder(path: str) -> None:
    with pytest.raises(UserError, match="gs://BUCKET/FOLDER"):
        split(path)


def test_a_name_that_no_bucket_has() -> None:
    with pytest.raises(UserError, match="'Bad_Bucket!' is no name of a bucket"):
        Objects("gs://Bad_Bucket!/run")


def test_checkpoints_are_the_same_as_on_a_disk(gcs: FakeGcs) -> None:
    with Checkpointer(PLACE, keep=2) as keeper:
        assert keeper.restore(state(0)) is None
        for step in (1, 2, 3):
            keeper.save(step, state(step), {"step": step}, best=1)
    keeper = Checkpointer(PLACE, keep=2)
    assert keeper.steps() == [1, 2, 3]
    found = keeper.restore(state(0))
    assert found is not None and found[0] == 3 and found[2] == {"step": 3}
    np.testing.assert_array_equal(found[1]["w"], state(3)["w"])
    keeper.save(4, state(4), {})
    keeper.wait()
    assert keeper.steps() == [3, 4]
    assert {name.split("/")[4] for name in gcs.names("bucket/runs/one/checkpoints/")} == {"step_000003", "step_000004"}


def test_half_written_and_damaged_ones_are_skipped(gcs: FakeGcs) -> None:
    keeper = Checkpointer(PLACE, keep=3)
    for step in (1, 2, 3):
        keeper.save(step, state(step), {})
        keeper.wait()
    below = "bucket/runs/one/checkpoints"
    del gcs.objects[f"{below}/step_000003/commit_success.txt"]  # the last thing that is written
    assert keeper.steps() == [1, 2]
    for name in gcs.names(f"{below}/step_000002/state/"):
        content, generation = gcs.objects[name]
        gcs.objects[name] = content[: len(content) // 2], generation + 1000
    found = Checkpointer(PLACE, keep=3).restore(state(0))
    assert found is not None and found[0] == 1
    keeper.save(2, state(2), {})
    keeper.wait()
    assert keeper.steps() == [1, 2] and not gcs.names(f"{below}/step_000003"), "replaced, and cleared away"


def test_a_bucket_that_refuses_is_one_clear_line(gcs: FakeGcs) -> None:
    keeper = Checkpointer(PLACE, keep=3)
    keeper.save(1, state(1), {})
    keeper.wait()
    gcs.refuse = lambda method, name: 403 if method == "POST" else None
    with pytest.raises(UserError, match=r"permission denied .*objectAdmin.*checkpoint of step 1 is untouched"):
        keeper.save(2, state(2), {})
        keeper.wait()
    gcs.refuse = lambda method, name: 401
    with pytest.raises(UserError, match="cannot read checkpoints in gs://.*: permission denied"):
        keeper.steps()
    gcs.refuse = None
    assert keeper.steps() == [1]


HOST = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from azr_jax.checkpoint import Checkpointer
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
mesh = Mesh(np.array(jax.devices()), ("x",))
def place(value, *spec):
    return jax.make_array_from_callback(value.shape, NamedSharding(mesh, P(*spec)), lambda index: value[index])
def state(step):
    return {"w": place(np.arange(512.0).reshape(64, 8) + step, "x"), "n": place(np.array(step))}
with Checkpointer("gs://bucket/two/checkpoints", keep=2) as keeper:
    for step in (1, 2, 3):
        keeper.save(step, state(step), {"n": step})
step, found, extra = Checkpointer("gs://bucket/two/checkpoints", keep=2).restore(state(0))
assert step == 3 and extra == {"n": 3}
for name, array in found.items():
    for mine, right in zip(array.addressable_shards, state(3)[name].addressable_shards, strict=True):
        np.testing.assert_array_equal(mine.data, right.data)
"""


def test_two_hosts_write_one_checkpoint(gcs: FakeGcs) -> None:
    """Neither has anything of the other's disk; each writes and reads its own half."""
    address = f"127.0.0.1:{free_port()}"
    commands = [[sys.executable, "-c", HOST, address, str(host)] for host in (0, 1)]
    hosts = [subprocess.Popen(c, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for c in commands]
    errors = [host.communicate()[1].decode() for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], errors
    names = {name.removeprefix("bucket/two/checkpoints/") for name in gcs.names("bucket/two/")}
    assert {name.split("/")[0] for name in names} == {"step_000002", "step_000003"}
    assert {"step_000003/state/ocdbt.process_0/manifest.ocdbt", "step_000003/commit_success.txt"} <= names
    assert "step_000003/state/ocdbt.process_1/manifest.ocdbt" in names


def train(tmp_path: Path, run_dir: str, machine: str, *overrides: str) -> tuple[int, str]:
    """`azr-jax train` on a machine with an empty disk; returns exit code and log."""
    command = [sys.executable, "-m", "azr_jax", "train", "configs/debug_cpu.yaml", f"run_dir={run_dir}"]
    command += ["tasks.seed_factor=1", "tasks.batch=2", "executor.workers=1", "eval.every=1", "eval.per_kind=4"]
    command += ["checkpoint.every=1", "checkpoint.keep=1", *overrides]
    environment = os.environ | {
        "XLA_FLAGS": xla_flags(1, quick=True),
        "XDG_CACHE_HOME": str(tmp_path / machine),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_a_run_goes_on_on_another_machine(gcs: FakeGcs, tmp_path: Path) -> None:
    """All that the second machine has is the bucket. The best checkpoint is kept besides the newest."""
    for machine, steps in (("one", 1), ("two", 2)):
        code, log = train(tmp_path, "gs://bucket/runs/demo/", machine, f"steps={steps}")
        assert code == 0 and ("resuming after step 1" in log) == (machine == "two"), log
    there = {name.removeprefix("bucket/runs/demo/"): gcs.objects[name][0] for name in gcs.names()}
    assert {"config.yaml", "metrics.jsonl", "tasks.jsonl", "report.html"} <= there.keys()
    rows = [json.loads(line) for line in there["metrics.jsonl"].splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    tasks = [json.loads(line)["step"] for line in there["tasks.jsonl"].splitlines()]
    assert tasks == sorted(tasks) and set(tasks) == {0, 1, 2}
    assert there["rollouts/step_000001.jsonl"] and there["rollouts/step_000002.jsonl"]
    scores = {row["step"]: row["eval/sampled/pooled"] for row in rows}
    best = min(scores, key=lambda step: (-scores[step], step))
    with Checkpointer("gs://bucket/runs/demo/checkpoints", 1) as keeper:
        assert keeper.steps() == sorted({best, 2})


def test_a_bucket_that_cannot_be_used_is_known_at_once(
    gcs: FakeGcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for status, says in (
        (403, "read gs://bucket/runs/demo: permission"),
        (404, "write gs://bucket/.*: no such bucket"),
    ):
        gcs.refuse = lambda method, name, status=status: status
        with pytest.raises(UserError, match=f"cannot {says}"):
            RunFolder.open("gs://bucket/runs/demo", "seed: 1\n")
    gcs.refuse = lambda method, name: 403 if method == "LIST" else None  # TensorStore takes that for an empty listing
    with pytest.raises(UserError, match="cannot be listed"):
        RunFolder.open("gs://bucket/runs/demo", "seed: 1\n")


def test_what_is_on_the_bucket_is_what_counts(gcs: FakeGcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working copy that lay about, of another run or with rows that never went up, does not come back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url, text = "gs://bucket/runs/demo", "run_dir: x\nseed: 1\n"
    with RunFolder.open(url, text) as folder:
        folder.append_metrics(0, {"time/step": 1.0})
        folder.write_rollouts(1, [{"a": 1}])
        folder.push()
        folder.append_metrics(1, {"time/step": 1.0})
        folder.write_rollouts(2, [{"a": 2}])
    with RunFolder.open(url, text) as folder:
        assert [row["step"] for row in folder.read_metrics()] == [0]
        assert sorted(path.name for path in folder.rollouts.iterdir()) == ["step_000001.jsonl"]
        folder.begin_after(0)
        folder.push()
    assert gcs.names("bucket/runs/demo/") == ["bucket/runs/demo/config.yaml", "bucket/runs/demo/metrics.jsonl"]
    gcs.objects.clear()
    gcs.objects["bucket/runs/demo/"] = b"", 1  # what the console makes for a folder
    with RunFolder.open(url, text) as folder:
        assert folder.read_metrics() == [] and folder.checkpoints == f"{url}/checkpoints"
    with pytest.raises(ConfigError, match="seed"), RunFolder.open(url, text) as folder:
        folder.append_metrics(0, {})
        folder.push()
        RunFolder.open(url, "run_dir: x\nseed: 2\n")
