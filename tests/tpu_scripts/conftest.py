"""The scripts in a copy of the repository's shape, with a gcloud that is only pretended (fake_gcloud.py)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Desk:
    """A user's machine: `repository` with the scripts and some settings, `fake` with the pretended cloud."""

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "my repository"  # a space, as home folders have them
        self.fake = folder / "fake"
        self.host = self.fake / "host"
        self.bin = folder / "bin"
        for path in (self.repository, self.fake, self.bin):
            path.mkdir()
        shutil.copytree(ROOT / "tpu_scripts", self.repository / "tpu_scripts")
        self.program("gcloud", f'exec {sys.executable} -I -S {Path(__file__).parent / "fake_gcloud.py"} "$@"')
        self.settings(PROJECT="a-project", BUCKET="gs://a-bucket/azr", POLL_SECONDS="0", SYNC_SECONDS="3600")

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def settings(self, **values: str) -> None:
        """Appends lines to settings.sh; the values are bash, quotes included."""
        with (self.repository / "tpu_scripts/settings.sh").open("a") as file:
            file.writelines(f"{name}={value}\n" for name, value in values.items())

    def replies(self, **queues: list[dict]) -> None:
        """What gcloud answers, by the piece of a command line that the name stands for."""
        pieces = {
            "queue": "queued-resources describe",
            "node": "tpu-vm describe",
            "create": "queued-resources create",
            "delete": "queued-resources delete",
            "state": "worker/state.sh",
            "install": "worker/install.sh",
            "ssh": "tpu-vm ssh",
            "scp": "tpu-vm scp",
            "ls": "storage ls",
            "rsync": "storage rsync",
        }
        (self.fake / "replies.json").write_text(json.dumps({pieces[name]: queue for name, queue in queues.items()}))

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name in ("LANG", "LC_ALL", "TMPDIR")}
        return kept | {"PATH": f"{self.bin}:/usr/bin:/bin", "FAKE": str(self.fake), "HOME": str(self.host)}

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs tpu_scripts/SCRIPT from another folder than the repository's."""
        return subprocess.run(
            ["bash", str(self.repository / "tpu_scripts" / script), *arguments],
            cwd=self.fake,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,  # against a hang only
        )

    @property
    def calls(self) -> list[list[str]]:
        """The arguments of every call of gcloud so far."""
        path = self.fake / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """Calls in short: `create`, `ssh worker/install.sh`..."""
        short = []
        for call in self.calls:
            command = next((word for word in call if word.startswith("--command=")), "")
            script = next((word for word in command.replace(";", " ").split() if "worker/" in word), "")
            verb = call[3] if call[0] == "compute" else call[1]
            short.append(f"{verb} {script.rpartition('/')[2]}".strip() if verb == "ssh" else verb)
        return short


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)
