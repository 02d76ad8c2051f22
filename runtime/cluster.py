"""Ray: starting it or joining it, what it has, and a group of rank actors. The home of Ray beside the workflow's tasks."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from runtime.config import ClusterConfig
from runtime.spec import EngineSpec

RANK_TIMEOUT_S = 3600.0
"""Longest that one call on the ranks may take before it is given up with an error."""

CONNECT_S = 5.0
"""Longest wait for a cluster's address to take a connection."""

PORTS_TRIED = 100
"""Ports looked at for the dashboard, from the configured one on."""


class ClusterError(ValueError):
    """The cluster cannot hold what the configuration asks for."""


@dataclass(frozen=True)
class ClusterInfo:
    """What Ray offers.

    Attributes:
        dashboard_url: address of the dashboard, "" without one.
        token_command: prints the token that the dashboard asks for, "" where it asks for none.
        cpus: CPUs that Ray may hand out.
        gpus: GPUs that Ray may hand out.
    """

    dashboard_url: str
    token_command: str
    cpus: float
    gpus: float


def start(config: ClusterConfig, run_dir: Path) -> ClusterInfo:
    """Start Ray on this machine, or join a running cluster, and check that one step's ranks fit.

    Raises:
        ClusterError: the resources asked for exceed what there is, or there is no such cluster; names both.
    """
    # Ray announces token authentication on the terminal; the caller says it beside the dashboard's address.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if config.address == "local":
        options |= {
            "address": "local",
            "include_dashboard": config.dashboard,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": _free_port(config.dashboard_port) if config.dashboard else None,
            "object_store_memory": 256 * 2**20,
            "_node_ip_address": "127.0.0.1",
        }
    else:
        _reach(config.address)
        options["address"] = config.address
    try:
        context = ray.init(**options)
    except ConnectionError as error:
        raise ClusterError(f"cluster.address: got {config.address!r}, but no Ray cluster answers there ({error})") from error
    url = context.dashboard_url
    have = ray.cluster_resources()
    info = ClusterInfo(f"http://{url}" if url else "", _token_command(), have.get("CPU", 0.0), have.get("GPU", 0.0))
    for name, ranks in (("ranks", config.ranks), ("expert_ranks", config.expert_ranks)):
        wanted_cpus, wanted_gpus = ranks * config.cpus_per_rank, ranks * config.gpus_per_rank
        if wanted_cpus > info.cpus or wanted_gpus > info.gpus:
            stop()
            raise ClusterError(
                f"cluster.{name}: {ranks} ranks x ({config.cpus_per_rank:g} CPUs, {config.gpus_per_rank:g} GPUs) = "
                f"{wanted_cpus:g} CPUs and {wanted_gpus:g} GPUs asked for, but Ray has {info.cpus:g} CPUs and {info.gpus:g} GPUs; "
                f"lower cluster.{name}, cluster.cpus_per_rank or cluster.gpus_per_rank, or give the address of a larger cluster"
            )
    return info


def stop() -> None:
    """Leave Ray, and end it where `start` started it."""
    ray.shutdown()


def _reach(address: str) -> None:
    """Refuse at once an address where nothing listens: Ray itself would try for half a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():  # `auto`, which Ray answers at once
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise ClusterError(f"cluster.address: got {address!r}, but nothing answers there ({error})") from error


def _free_port(first: int) -> int:
    """Return the first free port from `first` on: another run on this machine may have the configured one."""
    for port in range(first, first + PORTS_TRIED):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ClusterError(f"cluster.dashboard_port: got {first}, but ports {first} to {first + PORTS_TRIED - 1} are all taken")


def _token_command() -> str:
    """Return the command that prints the dashboard's token; Ray turns authentication on unless `RAY_AUTH_MODE` says otherwise."""
    return "" if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" else f"{Path(sys.executable).with_name('ray')} get-auth-token"


class _Rank:
    """The actor around one engine; the heavy imports happen here, in the rank's own process."""

    def __init__(self, rank: int) -> None:
        # On the dashboard: what this rank says, such as how it decodes.
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self.rank = rank
        self.engine: Any = None

    def address(self) -> str:
        """Return `host:port`, free at this moment, where rank 0 will wait for the others."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def start(self, spec: EngineSpec) -> None:
        """Bring the engine up; every rank must be starting for this to return."""
        os.environ["DS_ACCELERATOR"] = "cuda" if ray.get_gpu_ids() else "cpu"  # read by deepspeed on import
        # Nothing is compiled by torch; a decorator in DeepSpeed would load its compiler all the same, 0.9 of a rank's 3.2 s to start.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        from runtime.engine import Engine  # torch and DeepSpeed, which the process that loops does without

        self.engine = Engine(spec, self.rank)

    def call(self, method: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a method of the engine."""
        return getattr(self.engine, method)(*args, **kwargs)


class RayGroup:
    """All ranks of one step, as Ray actors that live as long as the process that made them."""

    def __init__(self, spec: EngineSpec, *, name: str, config: ClusterConfig) -> None:
        options = {"num_cpus": config.cpus_per_rank, "num_gpus": config.gpus_per_rank, "max_restarts": 0}
        actor: Any = ray.remote(_Rank)
        self._actors: list[Any] = [actor.options(name=f"{name}/rank-{i}-{os.getpid()}", **options).remote(i) for i in range(spec.ranks)]
        spec.rendezvous = "tcp://" + ray.get(self._actors[0].address.remote(), timeout=RANK_TIMEOUT_S)
        ray.get([actor.start.remote(spec) for actor in self._actors], timeout=RANK_TIMEOUT_S)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self._actors)

    def call(self, method: str, shares: Sequence[tuple] | None = None, **kwargs: Any) -> list[Any]:
        """Call a method of every rank's engine at once; `shares` holds each rank's own positional arguments."""
        shares = shares if shares is not None else [()] * self.ranks
        pending = [actor.call.remote(method, args, kwargs) for actor, args in zip(self._actors, shares, strict=True)]
        return ray.get(pending, timeout=RANK_TIMEOUT_S)

    def close(self) -> None:
        """Close the engines and end the ranks' processes."""
        self.call("close")
        for actor in self._actors:
            ray.kill(actor)
