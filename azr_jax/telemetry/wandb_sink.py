"""Metrics to Weights & Biases, if `wandb_project` names a project; metrics.jsonl is written in any case.

A resumed run goes on under the same id, made from the run folder's path. Nothing is sent but config and metrics: no
prompts, no responses, no code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from azr_jax.errors import UserError


class WandbSink:
    """Context manager; `log` does nothing where no project is given."""

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Raises: UserError if a project is given and wandb is not installed or cannot start."""
        self._run: Any = None
        if project == "none":
            return
        try:
            import wandb
        except ImportError:
            raise UserError("wandb_project is set but wandb is not installed; pip install wandb") from None
        try:
            self._run = wandb.init(
                project=project,
                name=run_dir.name,
                id=hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16],
                resume="allow",
                config=dict(config),
                save_code=False,
            )
        except Exception as error:  # wandb raises its own types for network, login and quota
            raise UserError(f"wandb project {project!r}: {error}; log in, or unset wandb_project") from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row of metrics."""
        if self._run is not None:
            self._run.log(dict(metrics), step=step)

    def __enter__(self) -> WandbSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if error is None else 1)
