"""The W&B sink against a stand-in module: what is sent, resuming under one id, and clear errors."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from azr_jax.errors import UserError
from azr_jax.telemetry.wandb_sink import WandbSink


class FakeRun:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.exit_code: int | None = None

    def log(self, row: dict[str, float], step: int) -> None:
        self.rows.append((step, row))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def test_rows_go_out_under_the_folders_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, calls = FakeRun(), []

    def init(**arguments: Any) -> FakeRun:
        calls.append(arguments)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))  # type: ignore[arg-type]
    with WandbSink("azr", tmp_path / "mine", {"seed": 1}) as sink:
        sink.log(3, {"reward/solve/deduction": 0.5})
    assert calls[0]["name"] == "mine" and len(calls[0]["id"]) == 16
    assert calls[0]["resume"] == "allow" and calls[0]["config"] == {"seed": 1}
    assert run.rows == [(3, {"reward/solve/deduction": 0.5})] and run.exit_code == 0


def test_a_failed_run_is_marked_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError), WandbSink("azr", tmp_path, {}):
        raise RuntimeError
    assert run.exit_code == 1


def test_missing_package_and_failed_login_are_user_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="pip install wandb"):
        WandbSink("azr", tmp_path, {})

    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no API key"):
        WandbSink("azr", tmp_path, {})


def test_without_a_project_nothing_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    with WandbSink("none", tmp_path, {}) as sink:
        sink.log(1, {"learner/loss": 0.0})
    assert sink._run is None
