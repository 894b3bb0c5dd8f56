"""The doctor: limits read from made-up cgroups, problems that say what to do, a table without surprises."""

from __future__ import annotations

from pathlib import Path

import pytest

from azr_jax import doctor, executor
from azr_jax.doctor import examine, free_memory, render
from azr_jax.executor import lockdown
from azr_jax.executor.sizing import cpu_quota


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, 1.5),  # v2: a parent limits
        ("0::/a\n", {"a/cpu.max": "400000 100000", "cpu.max": "200000 100000"}, 2.0),  # the tightest wins
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("4:cpu,cpuacct:/d\n0::/\n", {"cpu/d/cpu.cfs_quota_us": "50000", "cpu/d/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu:/d\n", {"cpu/d/cpu.cfs_quota_us": "-1", "cpu/d/cpu.cfs_period_us": "100000"}, None),
        ("", {}, None),
        ("nonsense", {"cpu.max": "1 2 3"}, None),
    ],
)
def test_cpu_quota(tmp_path, groups, files, quota):
    write(tmp_path, {"proc": groups, **{f"fs/{name}": text for name, text in files.items()}})
    assert cpu_quota(tmp_path / "fs", tmp_path / "proc") == quota


def test_free_memory_is_what_the_tightest_group_leaves(tmp_path):
    write(
        tmp_path,
        {
            "meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n",
            "proc": "0::/a\n",
            "fs/a/memory.max": "5000000",
            "fs/a/memory.current": "4500000",
            "fs/a/memory.stat": "anon 1\ninactive_file 1000000\n",
        },
    )
    assert free_memory(tmp_path / "fs", tmp_path / "proc", tmp_path / "meminfo") == 1_500_000
    assert free_memory(tmp_path / "none", tmp_path / "proc", tmp_path / "meminfo") == 8000 * 1024
    assert free_memory(tmp_path / "none", tmp_path / "none", tmp_path / "none") is None


def test_findings_name_the_fake_devices_and_this_python():
    findings = examine()
    assert [(entry["platform"], entry["count"]) for entry in findings["devices"]] == [("cpu", 8)]
    assert all(findings["versions"].values())
    table = render(findings)
    assert f"versions jax {' ' * 15} {findings['versions']['jax']}" in table
    assert "devices 0 count              8" in table


def test_problems_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "EMBEDDED_MODEL", tmp_path)
    monkeypatch.setattr(doctor, "PACKAGES", ("jax", "no-such-package"))
    monkeypatch.setattr(doctor, "MIN_FREE_DISK_GB", 1e9)
    monkeypatch.setattr(doctor, "free_memory", lambda: 2.0**29)
    findings = examine()
    assert not findings["ok"]
    text = "\n".join(findings["problems"])
    assert "no-such-package is not installed; pip install" in text
    assert "`make model` rebuilds it" in text
    assert "only 0.5 GiB of memory are free" in text
    assert "set run_dir" in text
    assert "problem: no-such-package" in render(findings)


def test_missing_sandbox_layers_are_a_problem_only_if_mandatory(monkeypatch):
    layers = dict.fromkeys((*lockdown.MANDATORY, *lockdown.OPTIONAL), True)
    monkeypatch.setitem(vars(executor), "sandbox_layers", lambda: layers)

    def sandbox_problems() -> list[str]:
        findings = examine()
        assert findings["sandbox"] == layers
        return [problem for problem in findings["problems"] if "sandbox" in problem]

    assert not sandbox_problems()
    layers[lockdown.OPTIONAL[0]] = False
    assert not sandbox_problems()
    layers[lockdown.MANDATORY[0]] = False
    (problem,) = sandbox_problems()
    assert lockdown.MANDATORY[0] in problem and "allow_weaker_sandbox" in problem


def test_a_sandbox_that_cannot_be_examined_is_a_problem(monkeypatch):
    def broken():
        raise OSError("fork failed")

    monkeypatch.setitem(vars(executor), "sandbox_layers", broken)
    findings = examine()
    assert findings["sandbox"] == {} and any("fork failed" in problem for problem in findings["problems"])
