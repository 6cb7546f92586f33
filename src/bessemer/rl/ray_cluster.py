"""Ray for a run: the cluster that RAY_ADDRESS names, or one of the run's own on this machine.

Our own listens on 127.0.0.1 alone, has no dashboard, tells nobody of its use, and ends with the run, however that ends
(Ray's processes follow the process that started them). RAY_ADDRESS=auto joins the Ray that runs on this machine.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from bessemer.errors import UserError
from bessemer.workers import shared_free

ADDRESS = "RAY_ADDRESS"
_OWN = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: take 127.0.0.1 for this node's address
    "RAY_AUTH_MODE": "token",  # other users of this machine may not run code in it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # else workers yield to whatever else runs here, the trainer first
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Read when Ray is imported."""
KNOCK_SECONDS = 10.0
STORE = 256 << 20
"""Smallest object store of our own Ray, bytes."""


def is_there() -> bool:
    """Whether Ray is installed."""
    from importlib.util import find_spec

    return find_spec("ray") is not None


def missing(engine: str) -> UserError:
    return UserError(f"rollout.engine = \"{engine}\" needs Ray: pip install 'bessemer[scale]'")


def ours() -> bool:
    """Whether a run here starts its own Ray: its workers then share this machine's cores with the trainer."""
    return not os.environ.get(ADDRESS)


class Cluster:
    """A connection to Ray, there until `close()`."""

    def __init__(self, weights: int) -> None:
        """weights: bytes of the model, for which our own object store must have room; 0 for work without one."""
        self.local = ours()
        if self.local:
            for name, value in _OWN.items():
                os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError:
            raise missing("ray") from None
        self.ray: ModuleType = ray
        self.mine = not ray.is_initialized()
        if self.mine:
            with _handlers_kept():
                self._connect(weights)

    def _connect(self, weights: int) -> None:
        quiet = dict(log_to_driver=False, configure_logging=False, include_dashboard=False if self.local else None)
        if not self.local:
            try:
                _knock(os.environ[ADDRESS])
                self.ray.init(**quiet)
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"no Ray cluster at {ADDRESS}={os.environ[ADDRESS]} ({str(error).splitlines()[0]}); start it, or "
                    f"unset {ADDRESS} for one of the run's own on this machine"
                ) from None
            return
        # the versions of two rollouts and of an evaluation may be held at once
        store = max(STORE, 4 * weights)
        if store > shared_free():
            wanted, instead = f"Ray takes {store >> 20} MiB of shared memory", 'engine.kind to "processes"'
            if weights:
                wanted = (
                    f"rollout workers are handed {weights >> 20} MiB of weights through shared memory, "
                    f"{store >> 20} MiB for a few versions"
                )
                instead = 'rollout.engine to "local"'
            raise UserError(
                f"{wanted}, and {shared_free() >> 20} MiB are free: enlarge /dev/shm (docker run --shm-size=...), or "
                f"set {instead}"
            )
        self.ray.init(address="local", num_cpus=len(os.sched_getaffinity(0)), object_store_memory=store, **quiet)

    def check(self, workers: int, gpus: int) -> None:
        """UserError where the cluster can never hold so many workers."""
        have, hint = self.ray.cluster_resources(), "lower rollout.workers, or add nodes to the cluster"
        for name, needed in (("CPU", workers), ("GPU", workers * gpus)):
            if needed > have.get(name, 0):
                each = "a CPU" if name == "CPU" else f"{gpus} GPU{'s' * (gpus > 1)}"
                raise UserError(
                    f"{workers} rollout workers need {each} each, and Ray has {have.get(name, 0):g} {name}s; {hint}"
                )

    def gpus(self) -> int:
        return int(self.ray.cluster_resources().get("GPU", 0))

    def close(self) -> None:
        if self.mine and self.ray.is_initialized():
            with _handlers_kept():
                self.ray.shutdown()


def _knock(address: str) -> None:
    """OSError where nobody listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS):
            pass


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself, and a run that is told to stop would end without a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
