"""Joining the job: this process becomes one host of several, or stays alone.

Who the others are is said by flags, or by the environment: a SLURM step of several tasks, a TPU slice of several hosts.
One host initialises nothing. Has to come before anything asks JAX for a device.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import urllib.request
from typing import Any

import jax
from jax._src.distributed import global_state  # its key-value store has no public name; Orbax takes it from here too

from azr_jax.dist.hosts import Hosts
from azr_jax.dist.watch import leave
from azr_jax.errors import ConfigError, UserError
from azr_jax.platforms import has_tpu

log = logging.getLogger(__name__)

JOIN_SECONDS = 300.0  # from the first host that starts to the last
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
#: Lists the hosts of a TPU slice, separated by commas.
ENDPOINTS = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"


def join(coordinator: str | None = None, hosts: int | None = None, host: int | None = None) -> Hosts:
    """Join by flags (all three) or as the environment says (none).

    coordinator: HOST:PORT of host 0, reachable by all. hosts: how many there are. host: which this is, from 0.
    ConfigError: some flags without the others, or a value outside its range. UserError: host 0 does not answer.
    """
    given = [coordinator, hosts, host]
    if given == [None, None, None]:
        where, arguments = from_environment()
        if where is None:
            return Hosts()
    else:
        arguments = from_flags(coordinator, hosts, host)
        where = f"--coordinator {coordinator} --hosts {hosts} --host {host}"
        if hosts == 1:
            return Hosts()
    log.info("joining the other hosts: %s", where)
    # JAX aborts when its patience ends, so ours ends first.
    late = threading.Timer(
        JOIN_SECONDS, leave, [f"after {JOIN_SECONDS:.0f} s not all hosts have joined ({where}). {HINT}"]
    )
    late.daemon = True
    late.start()
    try:
        if host:
            _wait_for(str(coordinator))
        _results_only()
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
        jax.distributed.initialize(initialization_timeout=int(JOIN_SECONDS) + 60, **arguments)
    finally:
        late.cancel()
    index, count = global_state.process_id, global_state.num_processes
    if index:
        logging.getLogger("azr_jax").setLevel(logging.WARNING)
    log.info("%d hosts have joined", count)
    return Hosts(index, count, global_state.client)


HINT = (
    "Is the command running on every host, with the same address and number of hosts and each with its own index? "
    "Is host 0 reachable there (name, port, firewall)?"
)


def from_flags(coordinator: str | None, hosts: int | None, host: int | None) -> dict[str, Any]:
    """Arguments for jax.distributed.initialize. ConfigError as `join`."""
    if coordinator is None or hosts is None or host is None:
        raise ConfigError("--coordinator, --hosts and --host belong together: give all three, or none of them")
    name, _, port = coordinator.rpartition(":")
    if not name or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--coordinator {coordinator}: must be HOST:PORT, of host 0 and a free port there")
    if hosts < 1 or not 0 <= host < hosts:
        raise ConfigError(f"--hosts {hosts} --host {host}: hosts are numbered from 0 to the number of hosts less 1")
    arguments = {"coordinator_address": coordinator, "num_processes": hosts, "process_id": host}
    return arguments | {"cluster_detection_method": "deactivate"}


def from_environment() -> tuple[str | None, dict[str, Any]]:
    """What says that there are several hosts (None: nothing), and arguments for jax.distributed.initialize."""
    if all(name in os.environ for name in SLURM) and int(os.environ["SLURM_NTASKS"]) > 1:
        found = f"task {os.environ['SLURM_PROCID']} of {os.environ['SLURM_NTASKS']} of a SLURM step"
        devices = os.environ.get("SLURM_GPUS_ON_NODE", "")
        if os.environ.get("SLURM_STEP_NUM_NODES") == os.environ["SLURM_NTASKS"] and devices.isdigit():
            return found, {"local_device_ids": list(range(int(devices)))}  # one task a node has all GPUs of it
        return found, {}  # JAX gives each task the GPU of its number
    if int(os.environ.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return f"one of {os.environ['MEGASCALE_NUM_SLICES']} TPU slices", {}
    if has_tpu() and os.environ.get("JAX_PLATFORMS") != "cpu":
        workers = os.environ.get("TPU_WORKER_HOSTNAMES") or _metadata()
        if "," in workers and " " not in workers:  # libtpu may have put a complaint there
            return f"one of {len(workers.split(','))} hosts of a TPU slice", {}
    return None, {}


def _metadata() -> str:
    """The hosts of this TPU slice, by the metadata server; "" where there is none."""
    request = urllib.request.Request(ENDPOINTS, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def _results_only() -> None:
    """Keep stdout for results: what libraries print there (Gloo does) goes to stderr from now on."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


def _wait_for(coordinator: str) -> None:
    """Until host 0 listens. UserError: it does not within JOIN_SECONDS."""
    name, _, port = coordinator.rpartition(":")
    deadline, trouble = time.monotonic() + JOIN_SECONDS - 2, ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((name.strip("[]"), int(port)), timeout=2):
                return
        except OSError as error:
            trouble = error.strerror or str(error)
            time.sleep(0.2)
    raise UserError(f"host 0 does not answer at --coordinator {coordinator}: {trouble}. {HINT}")
