"""A Ray of this machine alone: on loopback, behind a token of its own, and patient on a busy machine."""

from __future__ import annotations

import inspect
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

TOKEN = "token"
"""File of a Ray's secret, in its scratch directory."""
PRIVATE = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a node without a cluster is at 127.0.0.1 and listens nowhere else
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",  # there is no other way to have none
}
"""Environment of every process of such a Ray, whatever the caller's says."""
PATIENCE = 300.0
"""Seconds for Ray to come up, as long as its main process lives."""
WEB = "ray.dashboard.optional_deps"
"""Where this module is missing, Ray's agents leave out their web parts, and start in half the time."""


@contextmanager
def private(scratch: Path) -> Iterator[None]:
    """Bind Ray's services to loopback and require the token in ``scratch`` within the context.

    The environment is restored afterwards, and so is what Ray's library has read of it in this process.
    """
    path = scratch / TOKEN
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    given = {**PRIVATE, "RAY_AUTH_TOKEN_PATH": str(path)}
    before = {name: os.environ.get(name) for name in (*given, "RAY_AUTH_TOKEN")}
    os.environ.pop("RAY_AUTH_TOKEN", None)  # it would go before a path
    os.environ |= given
    try:
        from ray._private import ray_constants

        cluster, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
        _read_again()
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = cluster
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _read_again()


def _read_again() -> None:
    """Ray's library reads the environment when it is loaded, and a token once: both may have been for another Ray."""
    inner: Any = import_module("ray._raylet")  # compiled, so that type checkers know nothing of it
    inner.Config.initialize("")
    inner.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def patient() -> Iterator[None]:
    """Extend the time that a raylet waits for its agents' ports: 15 s, and Ray's 30 s, are too short on a busy machine.

    With ports that are known beforehand it starts without them, which on an idle machine is quicker too; for the agent
    that trials need it waits later, and longer.
    """
    from ray._private import services

    inner: Any = import_module("ray._raylet")
    begin = services.start_raylet

    def start_raylet(*given: Any, **words: Any) -> Any:
        names = "metrics_agent_port", "metrics_export_port", "runtime_env_agent_port"
        words |= dict(zip(names, _free_ports(len(names)), strict=True))
        told = inspect.signature(begin).bind(*given, **words).arguments
        # That of the web part, which a raylet is told in a file alone; -1 is what an agent without one writes.
        inner.persist_port(told["session_dir"], told["node_id"], inner.DASHBOARD_AGENT_LISTEN_PORT_NAME, -1)
        begun = begin(*given, **words)
        until = time.monotonic() + PATIENCE
        while begun.process.poll() is None and time.monotonic() < until:
            try:
                services.get_node(told["gcs_address"], told["node_id"])
                break
            except RuntimeError:  # it is not there yet
                time.sleep(0.1)
        return begun

    services.start_raylet = start_raylet
    try:
        yield
    finally:
        services.start_raylet = begin


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextmanager
def without_web() -> Iterator[None]:
    """Ray's agents started meanwhile have no web parts."""
    known = sys.modules.get(WEB)
    sys.modules[WEB] = None  # type: ignore[assignment]  # an import of it fails
    try:
        yield
    finally:
        del sys.modules[WEB]
        if known is not None:
            sys.modules[WEB] = known
