"""The CPU is chosen for the user exactly where libtpu would only make noise."""

from __future__ import annotations

import os

import pytest

from azr_jax.platforms import GOOGLE, skip_absent_tpu


@pytest.mark.parametrize(
    ("asked", "libtpu", "vendor", "kind", "nvidia", "chosen"),
    [
        (None, True, "0x8086", "0xff0000", False, "cpu"),
        (None, True, GOOGLE, "0xff0000", False, None),
        (None, True, GOOGLE, "0x020000", False, "cpu"),  # gVNIC, a network card
        (None, True, GOOGLE, "0x010802", False, "cpu"),  # a disk
        (None, True, "0x8086", "0xff0000", True, None),
        (None, False, "0x8086", "0xff0000", False, None),
        ("tpu", True, "0x8086", "0xff0000", False, "tpu"),
    ],
)
def test_choice(tmp_path, monkeypatch, asked, libtpu, vendor, kind, nvidia, chosen):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if asked:
        monkeypatch.setenv("JAX_PLATFORMS", asked)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if libtpu else None)
    (tmp_path / "devices" / "0000:00:01.0").mkdir(parents=True)
    (tmp_path / "devices" / "0000:00:01.0" / "vendor").write_text(vendor + "\n")
    (tmp_path / "devices" / "0000:00:01.0" / "class").write_text(kind + "\n")
    if nvidia:
        (tmp_path / "nvidiactl").touch()
    skip_absent_tpu(tmp_path / "devices", tmp_path / "nvidiactl")
    assert os.environ.get("JAX_PLATFORMS") == chosen
