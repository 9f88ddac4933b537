"""A Ray of this machine alone: on loopback, behind a token of its own, and silent."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from types import ModuleType

QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a banner whatever it is told
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths are meant from where the driver was started
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives its Ray must not start another
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # what the raylet says of a process that died comes as an outcome
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_agent_register_timeout_ms": "300000",  # a busy machine is no reason to give up
    "RAY_enable_worker_prestart": "0",  # such processes lack the environment of a trial and are never used for one
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_worker_niceness": "0",  # a run is as urgent as the same run without Ray
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours lets each run end at a step, with a checkpoint
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",
    "TUNE_WARN_THRESHOLD_S": "1000000",
}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""A node without a cluster is at 127.0.0.1 and listens nowhere else. The driver reads this when it loads Ray."""
PRIVATE = {
    **LOOPBACK,
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",  # there is no other way to have none
}
"""Environment of every process of such a Ray, whatever the caller's says."""
AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
"""Of the caller's Ray. Where no mode is set, a Ray that is started here requires a token; one of the environment would
be used before one of a file."""
OLDEST = (2, 59)
"""Release of Ray that requires a token of a Ray that is started, unless the environment says otherwise."""
TOKEN = "token"
"""File of a Ray's secret, in its scratch directory."""


def load_ray(local: bool) -> ModuleType:
    """Import Ray with the environment that it reads when it is loaded, and return it.

    local: Ray is to be started here, on loopback, and not joined. A Ray that is loaded already keeps its settings.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module="ray")
    with _environment(LOOPBACK if local else {}):
        import ray
    return ray


@contextmanager
def private(scratch: Path) -> Iterator[None]:
    """Bind Ray's services to loopback and require the token in ``scratch`` within the context.

    The environment is restored afterwards. Raises ValueError if Ray was loaded before for another address or is older
    than ``OLDEST``.
    """
    import ray

    if tuple(int(part) for part in ray.__version__.split(".")[:2]) < OLDEST:
        raise ValueError(f"Ray: requires {OLDEST[0]}.{OLDEST[1]} or newer, got {ray.__version__}; run make setup")
    address = ray.util.get_node_ip_address()
    if not ip_address(address).is_loopback:
        name, value = next(iter(LOOPBACK.items()))
        raise ValueError(
            f"Ray: it was loaded before and would listen at {address}; use a new process, or set {name}={value} before "
            "Ray is imported"
        )
    path = scratch / TOKEN
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(_secret())
    with _environment({**PRIVATE, "RAY_AUTH_TOKEN_PATH": str(path)}, AUTHENTICATION):
        yield


@cache
def _secret() -> str:
    """Return this process's token: Ray's library reads one once, so that all Rays of a process have the same."""
    return secrets.token_hex(32)


@contextmanager
def _environment(given: Mapping[str, str], without: tuple[str, ...] = ()) -> Iterator[None]:
    """Set and remove variables of the environment within the context."""
    before = {name: os.environ.get(name) for name in (*given, *without)}
    for name in without:
        os.environ.pop(name, None)
    os.environ |= given
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
