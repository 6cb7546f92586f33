"""Ray for a run: the cluster that RAY_ADDRESS names, or the run's own on this machine.

The run's own cluster listens only on 127.0.0.1, has no dashboard, sends no usage statistics, and ends with the run,
however that ends (Ray's processes exit with the process that started them). RAY_ADDRESS=auto joins the Ray that already
runs on this machine.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

from bessemer.addons.accelerate.shared_memory import SHARED, shared_free
from bessemer.errors import UserError
from bessemer.system import granted_cores

ADDRESS = "RAY_ADDRESS"
VISIBLE = "CUDA_VISIBLE_DEVICES"
_OWN = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: this node's address is 127.0.0.1
    "RAY_AUTH_MODE": "token",  # other users of this machine may not run code in it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # else workers yield to all other processes, the trainer first
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment of our own Ray, read when Ray is imported."""
CONNECT_SECONDS = 10.0
STORE = 256 << 20
"""Smallest object store of our own Ray, bytes."""


def is_installed() -> bool:
    return find_spec("ray") is not None


def not_installed(engine: str) -> UserError:
    return UserError(f"rollout.engine = \"{engine}\" needs Ray: pip install 'bessemer[scale]'")


def starts_own() -> bool:
    """Whether a run starts its own Ray: its workers then share this machine's cores with the trainer."""
    return not os.environ.get(ADDRESS)


class RayCluster:
    """A connection to Ray, until `close()`."""

    def __init__(self, weights: int, gpus: Sequence[str] | None = None) -> None:
        """weights: bytes of the model, for which our own object store must have room; 0 for jobs without a model.
        gpus: names of the GPUs that our own Ray may hand out, as in CUDA_VISIBLE_DEVICES; None: all."""
        self.local, self._gpu_names = starts_own(), gpus
        if self.local:
            for name, value in _OWN.items():
                os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError:
            raise not_installed("ray") from None
        self.ray: ModuleType = ray
        self.owns_connection = not ray.is_initialized()
        if self.owns_connection:
            with _keep_handlers():
                self._connect(weights)

    def _connect(self, weights: int) -> None:
        quiet = dict(log_to_driver=False, configure_logging=False, include_dashboard=False if self.local else None)
        if not self.local:
            try:
                _try_connect(os.environ[ADDRESS])
                self.ray.init(**quiet)
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"no Ray cluster at {ADDRESS}={os.environ[ADDRESS]} ({str(error).splitlines()[0]}); start it, or "
                    f"unset {ADDRESS} for the run to start its own on this machine"
                ) from None
            return
        # the store may hold the versions of two rollouts and of an evaluation at once
        store = max(STORE, 4 * weights)
        if os.path.isdir(SHARED) and store > shared_free():  # without /dev/shm, Ray keeps its store in files
            needed, instead = f"Ray takes {store >> 20} MiB of shared memory", 'engine.kind to "processes"'
            if weights:
                needed = (
                    f"rollout workers get {weights >> 20} MiB of weights through shared memory, "
                    f"{store >> 20} MiB for a few versions"
                )
                instead = 'rollout.engine to "local"'
            raise UserError(
                f"{needed}, but {shared_free() >> 20} MiB are free: enlarge /dev/shm (docker run --shm-size=...), or "
                f"set {instead}"
            )
        with _visible(self._gpu_names):
            self.ray.init(address="local", num_cpus=granted_cores(), object_store_memory=store, **quiet)

    def check(self, workers: int, gpus: int) -> None:
        """UserError if the cluster is too small for so many workers."""
        have, hint = self.ray.cluster_resources(), "lower rollout.workers, or add nodes to the cluster"
        for name, needed in (("CPU", workers), ("GPU", workers * gpus)):
            if needed > have.get(name, 0):
                cost = "a CPU" if name == "CPU" else f"{gpus} GPU{'s' * (gpus > 1)}"
                raise UserError(
                    f"{workers} rollout workers need {cost} each, but Ray has {have.get(name, 0):g} {name}s; {hint}"
                )

    def gpus(self) -> int:
        return int(self.ray.cluster_resources().get("GPU", 0))

    def close(self) -> None:
        if self.owns_connection and self.ray.is_initialized():
            with _keep_handlers():
                self.ray.shutdown()


def _try_connect(address: str) -> None:
    """OSError if no server listens at host:port: Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS):
            pass


@contextmanager
def _visible(gpus: Sequence[str] | None) -> Iterator[None]:
    """Processes that start inside the block see only these GPUs."""
    value = os.environ.get(VISIBLE)
    if gpus is not None:
        os.environ[VISIBLE] = ",".join(gpus)
    try:
        yield
    finally:
        os.environ.pop(VISIBLE, None)
        if value is not None:
            os.environ[VISIBLE] = value


@contextmanager
def _keep_handlers() -> Iterator[None]:
    """Restores signal handlers: Ray's SIGTERM handler ends a run without a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
