"""Rules for a cluster's file that Ray's own validation lacks, a function each."""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from viladiff.config.base import did_you_mean

Keys = tuple[str | int, ...]
TOKEN = "~/.ray/auth_token"
PORTS = {6379: "Ray's head", 8265: "the dashboard", 10001: "Ray's clients"}
PLACE = {"aws": ("region",), "gcp": ("region", "project_id"), "azure": ("location", "resource_group"), "local": ()}
"""Keys that name the place of the machines, by provider; Ray's schema leaves them open."""
MACHINE: dict[str, tuple[str, ...]] = {
    "aws": ("InstanceType", "ImageId"),
    "gcp": ("machineType",),
    "azure": ("azure_arm_parameters",),
}
"""Keys of ``node_config`` that name the machine. Without an image, AWS gets one of 2018 from Ray."""
GPU_MACHINE = re.compile(r"(g\d|p\d|a[23]-|n1-.*gpu|standard_n[cdgv]|trn|inf|dl)", re.IGNORECASE)
"""Instance families with an accelerator: AWS, Google, Azure."""
SHELL = r"(?:[^|;&]|\\\n)*"
"""The rest of one command within a line of shell."""


class ConfigProblem(NamedTuple):
    keys: Keys
    """Where, as keys from the top of the file."""
    found: str
    remedy: str
    broken: bool = True


class Cluster(NamedTuple):
    file: Path
    raw: dict[str, Any]
    """The file's content."""
    ready: dict[str, Any]
    """The same with Ray's defaults filled in, as the autoscaler sees it."""
    lines: dict[Keys, int]
    """Line of each key."""

    @property
    def provider(self) -> str:
        return str(self.raw["provider"]["type"])

    @property
    def workers(self) -> dict[str, dict[str, Any]]:
        """Node types beside the head's; none with provider ``local``, whose machines are listed by address."""
        types: dict[str, dict[str, Any]] = self.raw.get("available_node_types", {})
        return {name: kind for name, kind in types.items() if name != self.raw.get("head_node_type")}

    def setups(self) -> dict[Keys, list[str]]:
        """Return the set-up commands of each kind of node, by the key to edit; a node type's own replace all common
        ones.
        """
        own = {
            name: kind["worker_setup_commands"]
            for name, kind in self.workers.items()
            if "worker_setup_commands" in kind
        }
        found: dict[Keys, list[str]] = {("head_setup_commands",): self.ready["head_setup_commands"]}
        if len(own) < len(self.workers) or not self.workers:
            found["worker_setup_commands",] = self.ready["worker_setup_commands"]
        return found | {("available_node_types", name, "worker_setup_commands"): own[name] for name in own}

    def starts(self) -> Iterator[tuple[Keys, str]]:
        """Each command that starts Ray, by key."""
        for part in ("head_start_ray_commands", "worker_start_ray_commands"):
            for i, command in enumerate(self.ready.get(part, [])):
                if re.search(r"\bray start\b", command):
                    yield (part, i), command


def _blank(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"<.*>", value.strip()) is not None


def _blanks(cluster: Cluster) -> Iterator[ConfigProblem]:
    def walk(value: object, keys: Keys) -> Iterator[ConfigProblem]:
        if isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(inner, (*keys, key))
        elif _blank(value):
            yield ConfigProblem(keys, f"still {value}", "fill it in")

    yield from walk(cluster.raw, ())


def _provider(cluster: Cluster) -> Iterator[ConfigProblem]:
    kind, given = cluster.provider, cluster.raw["provider"]
    if kind not in PLACE:
        yield ConfigProblem(
            ("provider", "type"),
            f"{kind!r}: these checks know {', '.join(PLACE)}{did_you_mean(kind, PLACE)}",
            "the keys that it needs were not checked",
            broken=bool(did_you_mean(kind, PLACE)),
        )
    for name in PLACE.get(kind, ()):
        if not given.get(name):
            yield ConfigProblem(
                ("provider",), f"no {name}", f"add {name}: {did_you_mean(name, given).removeprefix('; ')}".rstrip(": ")
            )
    region = str(given.get("region", ""))
    if kind == "aws" and region and not _blank(region) and not re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d", region):
        yield ConfigProblem(
            ("provider", "region"), f"{region!r} is not a region of AWS", "write it as eu-central-1, not a zone"
        )


def _machines(cluster: Cluster) -> Iterator[ConfigProblem]:
    """Each type says its machine; the head has no GPU, and some other type has."""
    wanted = MACHINE.get(cluster.provider, ())
    types = cluster.raw.get("available_node_types", {})
    if wanted and not types:
        yield ConfigProblem(
            (), "no available_node_types: Ray would take its own small ones", "describe a head and GPU workers"
        )
        return
    for name, kind in types.items():
        here = ("available_node_types", name, "node_config")
        for key in wanted:
            if not kind["node_config"].get(key):
                like = did_you_mean(key, kind["node_config"]).removeprefix("; ")
                yield ConfigProblem(
                    here, f"no {key}", f"add {key}; Ray's default does not suit torch. {like}".strip(". ")
                )
    head = cluster.raw.get("head_node_type")
    if head in types and _has_gpu(types[head]):
        found = f"the head {head!r} has a GPU, and costs as much all the time"
        yield ConfigProblem(
            ("available_node_types", str(head)), found, "take an instance type without one, and resources GPU: 0"
        )
    blank = any(_blank(machine) for kind in types.values() for machine in kind["node_config"].values())
    if wanted and not blank and not any(_has_gpu(kind) for kind in cluster.workers.values()):
        yield ConfigProblem(
            ("available_node_types",), "no node type beside the head has a GPU", "give one a GPU instance type"
        )


def _has_gpu(kind: dict[str, Any]) -> bool:
    config = kind["node_config"]
    machine = str(config.get("InstanceType") or config.get("machineType") or config.get("azure_arm_parameters", ""))
    accelerated = bool(config.get("guestAccelerators")) or ("vmSize" in machine and "Standard_N" in machine)
    return kind.get("resources", {}).get("GPU", 0) > 0 or accelerated or bool(GPU_MACHINE.match(machine))


def _scaling(cluster: Cluster) -> Iterator[ConfigProblem]:
    types, total = cluster.raw.get("available_node_types", {}), cluster.ready["max_workers"]
    for name, kind in types.items():
        here = ("available_node_types", name)
        low, high = kind.get("min_workers", 0), kind.get("max_workers", total)
        if name == cluster.raw.get("head_node_type"):
            if low or kind.get("max_workers", 0):
                yield ConfigProblem(
                    (*here, "max_workers"), "more machines of the head's type", "set min and max_workers to 0"
                )
            continue
        if low > high:
            yield ConfigProblem((*here, "min_workers"), f"{low}: more than its max_workers, {high}", f"at most {high}")
        if high > total:
            yield ConfigProblem(
                (*here, "max_workers"), f"{high}: more than max_workers over all types, {total}", "never reached"
            )
        if low and _has_gpu(kind):
            yield ConfigProblem((*here, "min_workers"), f"{low}: a GPU machine that runs without work", "set it to 0")
    most = sum(kind.get("max_workers", total) for kind in cluster.workers.values())
    if cluster.workers and most < total:
        yield ConfigProblem(
            ("max_workers",), f"{total}: the types together give at most {most}", f"{most} says the same", False
        )
    if cluster.provider != "local" and not 0 < cluster.ready["idle_timeout_minutes"] <= 60:
        found = f"{cluster.ready['idle_timeout_minutes']} minutes until a machine without work goes"
        yield ConfigProblem(("idle_timeout_minutes",), found, "1 to 60 spare both restarts and money")


def _mounts(cluster: Cluster) -> Iterator[ConfigProblem]:
    """Every source exists; none drags along what ``ray up`` would read file by file."""
    folder = cluster.file.resolve().parent
    for remote, local in cluster.raw.get("file_mounts", {}).items():
        if _blank(local):
            continue
        here, source = ("file_mounts", remote), _source(cluster, local)
        if not source.exists():
            siblings = [path.name for path in source.parent.iterdir()] if source.parent.is_dir() else []
            remedy = f"create it, or fix the path{did_you_mean(source.name, siblings)}"
            yield ConfigProblem(
                here, f"{source} does not exist", "run: ray get-auth-token --generate" if remote == TOKEN else remedy
            )
        elif heavy := [name for name in (".venv", "runs") if (source / name).exists()]:
            found = (
                f"{local}: has {' and '.join(heavy)} in it; ray up reads all of it, and restarts Ray when it changed"
            )
            yield ConfigProblem(here, found, "mount the parts of the repository that the nodes need", False)
        elif not Path(local).expanduser().is_absolute() and folder != Path.cwd():
            yield ConfigProblem(here, f"{local}: relative to where ray up is called", f"call ray up in {folder}", False)


def _source(cluster: Cluster, local: str) -> Path:
    return cluster.file.resolve().parent / Path(local).expanduser()


def _repository(cluster: Cluster) -> Iterator[ConfigProblem]:
    """Each kind of node installs a folder with pip -e, and what that needs is mounted there."""
    needed = {"pyproject.toml", "viladiff"}
    project = cluster.file.resolve().parent / "pyproject.toml"
    if project.is_file():
        tables = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        needed |= {tables.get("readme", "pyproject.toml"), *tables.get("license-files", ())}
    mounts = {_tidy(remote): str(local) for remote, local in cluster.raw.get("file_mounts", {}).items()}
    seen: set[str] = set()
    for keys, commands in cluster.setups().items():
        installs = re.findall(rf"\bpip3? install\b{SHELL}?(?:-e|--editable)[ =](\S+)", "\n".join(commands))
        targets = [_tidy(target.strip("'\"").partition("[")[0]) for target in installs]
        if not targets:
            yield ConfigProblem(keys, "does not install the project", "add: pip install -e ~/viladiff")
        for target in set(targets) - seen:
            seen.add(target)
            for part in sorted(needed):
                whole = mounts.get(target)
                inside = _source(cluster, whole) / part if whole is not None else None
                if f"{target}/{part}" not in mounts and not (inside is not None and inside.exists()):
                    yield ConfigProblem(
                        ("file_mounts",), f"{target}/{part} is not mounted, but installed", f"mount {part} there"
                    )
            if f"{target}/.git" not in mounts and target not in mounts:
                found = f"{target}/.git is not mounted: records cannot say their revision"
                yield ConfigProblem(("file_mounts",), found, "mount .git there too", False)


def _tidy(remote: str) -> str:
    return str(PurePosixPath(remote.replace("$HOME", "~")))


def _path(cluster: Cluster) -> Iterator[ConfigProblem]:
    """`ray down` runs `ray stop` in a shell that reads no profile."""
    for keys, commands in cluster.setups().items():
        linked = [command for command in commands if re.search(r"\bray\b.*(/usr/local/bin|/usr/bin)\b", command)]
        if not linked and not any("/etc/environment" in command for command in commands):
            remedy = "add: sudo ln -sf ~/viladiff-env/bin/ray /usr/local/bin/"
            yield ConfigProblem(
                keys, "`ray` is not on the PATH of a shell that is no login shell, so ray down stops nothing", remedy
            )


def _dashboard(cluster: Cluster) -> Iterator[ConfigProblem]:
    for keys, command in cluster.starts():
        host = re.search(r"--dashboard-host[= ](\S+)", command)
        said = host.group(1).strip("'\"") if host else None
        if said is None and "--head" in command:
            yield ConfigProblem(keys, "no --dashboard-host", "add --dashboard-host=127.0.0.1 to ray start")
        elif said is not None and not re.fullmatch(r"127\.\d+\.\d+\.\d+|localhost|::1", said):
            found = f"--dashboard-host={said}: whoever reaches the dashboard runs code here"
            yield ConfigProblem(keys, found, "--dashboard-host=127.0.0.1, and open it with: ray dashboard cluster.yaml")


def _token(cluster: Cluster) -> Iterator[ConfigProblem]:
    for keys, command in cluster.starts():
        mode = re.search(r"\bRAY_AUTH_MODE=(\S+)\b.*\bray start\b", command, re.DOTALL)
        if mode is None or mode.group(1).strip("'\";") != "token":
            found = f"RAY_AUTH_MODE={mode.group(1)}" if mode else "no RAY_AUTH_MODE"
            remedy = "RAY_AUTH_MODE=token ray start …, in this command: each is a shell of its own"
            yield ConfigProblem(keys, f"{found}: whoever reaches the port runs code here", remedy)
        if "RAY_AUTH_TOKEN=" in command:
            yield ConfigProblem(
                keys, "the token itself stands in the command, for all to read", f"mount {TOKEN} instead"
            )
    for keys, commands in cluster.setups().items():
        if not any(
            re.search(r"RAY_AUTH_MODE=token.*(bashrc|profile|/etc/environment)", command) for command in commands
        ):
            remedy = "add: echo 'export RAY_AUTH_MODE=token' >> ~/.bashrc"
            yield ConfigProblem(keys, "no shell says RAY_AUTH_MODE=token, so programs of ray exec cannot join", remedy)
    local = cluster.raw.get("file_mounts", {}).get(TOKEN)
    if local is None:
        like = did_you_mean(TOKEN, cluster.raw.get("file_mounts", {}))
        found = f"{TOKEN} is not mounted: nodes cannot join without the token{like}"
        yield ConfigProblem(("file_mounts",), found, f"add {TOKEN}: {TOKEN}")
    elif _source(cluster, local).exists() and _source(cluster, local).stat().st_mode & 0o077:
        yield ConfigProblem(
            ("file_mounts", TOKEN), f"others of this machine can read {local}", f"chmod 600 {local}", False
        )


def _join(cluster: Cluster) -> Iterator[ConfigProblem]:
    """One head, and workers that go to its address and port."""
    starts = list(cluster.starts())
    heads = [command for (part, _), command in starts if part == "head_start_ray_commands"]
    port = re.search(r"--port[= ](\d+)", heads[0]) if heads else None
    expected = port.group(1) if port else "6379"
    for part in ("head_start_ray_commands", "worker_start_ray_commands"):
        if not any(keys[0] == part for keys, _ in starts):
            yield ConfigProblem((part,), "no command starts Ray", "add: RAY_AUTH_MODE=token ray start …")
    for keys, command in starts:
        if keys[0] == "head_start_ray_commands":
            for flag in ("--head", "--autoscaling-config=~/ray_bootstrap_config.yaml"):
                if flag not in command.replace("config ~", "config=~"):
                    yield ConfigProblem(
                        keys, f"no {flag}", f"add {flag} to ray start; without it no machine would be added"
                    )
            continue
        address = re.search(r"--address[= ]['\"]?\$\{?RAY_HEAD_IP\}?:(\d+)", command)
        if address is None or address.group(1) != expected or "--head" in command:
            yield ConfigProblem(keys, "does not join the head", f"ray start --address=$RAY_HEAD_IP:{expected}")


def _open_ports(cluster: Cluster) -> Iterator[ConfigProblem]:
    rules = cluster.raw["provider"].get("security_group", {}).get("IpPermissions", [])
    for i, rule in enumerate(rules):
        ranges = [*rule.get("IpRanges", ()), *rule.get("Ipv6Ranges", ())]
        public = [r for r in ranges if str(r.get("CidrIp", r.get("CidrIpv6", ""))).endswith("/0")]
        low, high = rule.get("FromPort", 0), rule.get("ToPort", 65535)
        if str(rule.get("IpProtocol")) == "-1" or low == -1:
            low, high = 0, 65535
        hit = [f"{port} ({what})" for port, what in PORTS.items() if low <= port <= high]
        if public and hit:
            found = f"opens {', '.join(hit)} to everybody"
            yield ConfigProblem(
                ("provider", "security_group", "IpPermissions", i), found, "leave port 22 alone open; use ssh"
            )
    for name in ("run_options", "head_run_options", "worker_run_options"):
        for i, option in enumerate(cluster.raw.get("docker", {}).get(name, ())):
            if re.match(r"(-p|--publish)\b(?!.*127\.0\.0\.1)", str(option)):
                yield ConfigProblem(
                    ("docker", name, i), f"{option}: publishes a port on all addresses", "drop it; use ssh"
                )


def _ssh(cluster: Cluster) -> Iterator[ConfigProblem]:
    auth = cluster.raw.get("auth", {})
    if not auth.get("ssh_user"):
        yield ConfigProblem(("auth",), "no ssh_user", "add ssh_user: the image's user, as ubuntu")
    key = auth.get("ssh_private_key")
    if key is None or _blank(key):
        return  # without one Ray makes a key pair of its own
    file = _source(cluster, key)
    if not file.is_file():
        siblings = [path.name for path in file.parent.iterdir()] if file.parent.is_dir() else []
        yield ConfigProblem(
            ("auth", "ssh_private_key"), f"{file} does not exist", f"fix the path{did_you_mean(file.name, siblings)}"
        )
    elif file.stat().st_mode & 0o077:
        yield ConfigProblem(
            ("auth", "ssh_private_key"), f"{file}: others can read it, so ssh refuses it", f"chmod 600 {file}"
        )
    for name, kind in cluster.raw.get("available_node_types", {}).items():
        if cluster.provider == "aws" and not kind["node_config"].get("KeyName"):
            found = "no KeyName beside an ssh_private_key: the machine would not let that key in"
            yield ConfigProblem(
                ("available_node_types", name, "node_config"), found, "add KeyName, the pair's name in EC2"
            )


def _shared(cluster: Cluster) -> Iterator[ConfigProblem]:
    """Yield a problem for storage on a worker's own disk, which is lost with the worker, together with its runs."""
    commands = [command for found in cluster.setups().values() for command in found]
    commands += cluster.ready.get("worker_start_ray_commands", [])
    if cluster.provider != "local" and not any(re.search(r"\b(mount|mount\.\w+|s3fs|gcsfuse)\s", c) for c in commands):
        found = "no worker mounts a shared folder, so runs would go with their machine"
        yield ConfigProblem(
            ("worker_start_ray_commands",), found, "mount one before ray start, and give it as --runs-dir"
        )


def _tools(cluster: Cluster) -> Iterator[ConfigProblem]:
    """Programs that ``ray up`` calls on this machine."""
    for tool in ("ssh", "rsync"):
        if shutil.which(tool) is None:
            yield ConfigProblem((), f"this machine has no {tool}, which ray up calls", f"install {tool}", False)
    if cluster.provider == "aws" and find_spec("boto3") is None:
        yield ConfigProblem(
            (), "this installation has no boto3, which ray up needs for AWS", "pip install boto3", False
        )


RULES: dict[str, Callable[[Cluster], Iterator[ConfigProblem]]] = {
    "filled in": _blanks,
    "provider": _provider,
    "machines": _machines,
    "scaling": _scaling,
    "sources": _mounts,
    "repository": _repository,
    "path": _path,
    "dashboard": _dashboard,
    "token": _token,
    "joining": _join,
    "ports": _open_ports,
    "ssh": _ssh,
    "shared folder": _shared,
    "tools": _tools,
}
"""What is looked at once Ray accepts the file, in the order of the report."""
