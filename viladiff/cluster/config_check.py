"""What ``ray up`` accepts and then fails at or pays for, or leaves open to others, is found here first, and for free.

Ray's published schema rejects unknown keys, but passes a file without a region, with a GPU machine as head, or with a
dashboard that runs anybody's code. Nothing is started, and no cloud is asked.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple

# yaml and jsonschema are Ray's own dependencies.
import jsonschema
import yaml

from viladiff.cluster.exposure import (
    export_faults,
    joined,
    mount_faults,
    networks_of,
    opened_to_outside,
    ports_given,
    rule_fault,
    services_of,
)
from viladiff.config.base import did_you_mean
from viladiff.core.checks import Check
from viladiff.core.messages import one_line, shown

Keys = tuple[str | int, ...]
TOKEN = "~/.ray/auth_token"
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
PLACE = {"aws": ("region",), "gcp": ("region", "project_id"), "azure": ("location", "resource_group"), "local": ()}
"""Keys that name the place of the machines, by provider; Ray's schema leaves them open."""
IDLE = 5
"""Minutes of ``idle_timeout_minutes`` that Ray takes where the file says nothing."""
MACHINE: dict[str, tuple[str, ...]] = {
    "aws": ("InstanceType", "ImageId"),
    "gcp": ("machineType",),
    "azure": ("azure_arm_parameters",),
}
"""Keys of ``node_config`` that name the machine. Without an image, AWS gets one of 2018 from Ray."""
GPU_MACHINE = re.compile(r"(g\d|p\d|a[23]-|n1-.*gpu|standard_n[cdgv]|trn|inf|dl)", re.IGNORECASE)
"""Instance families with an accelerator: AWS, Google, Azure."""

MOST_VALUES = 20_000
"""Values of a file with its aliases written out; Ray's example files have below 200."""


class ConfigProblem(NamedTuple):
    keys: Keys
    """Where, as keys from the top of the file."""
    found: str
    remedy: str
    broken: bool = True


class Cluster(NamedTuple):
    file: Path
    raw: dict[str, Any]
    """The file's content, which Ray's schema accepts."""
    lines: dict[Keys, int]
    """Line of each key."""

    @property
    def provider(self) -> str:
        return str(self.raw["provider"]["type"])

    @property
    def types(self) -> dict[str, dict[str, Any]]:
        """Node types by name; none with provider ``local``, whose machines are listed by address."""
        found: dict[str, dict[str, Any]] = self.raw.get("available_node_types", {})
        return found

    def starts(self) -> Iterator[tuple[Keys, str]]:
        """Each command that starts Ray, by key."""
        for part in STARTS:
            for i, command in enumerate(self.raw.get(part, [])):
                if re.search(r"\bray start\b", command):
                    yield (part, i), command


def examine_cluster(file: str | Path) -> list[Check]:
    """Return a line for each rule, and one for each violation. Raises OSError if the file cannot be read.

    Later rules are checked only if Ray's schema accepts the file, since they rely on its structure.
    """
    path = Path(file)
    text = path.read_text(encoding="utf-8")
    lines: dict[Keys, int] = {}
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
        repeated = list(_repeated(tree, (), lines))
    except (RecursionError, ValueError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else one_line(str(error), 100)
        return [Check("cluster: yaml", f"{path.name}: {why}", "write plain keys and values", True)]
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        found = f"{path.name}:{where.line + 1 if where else '?'}: {getattr(error, 'problem', error)}"
        return [Check("cluster: yaml", found, "fix the line; quote values with ': ', '#' or '*' in them", True)]
    if not isinstance(raw, dict):
        return [Check("cluster: yaml", f"{path.name}: not a mapping", "write key: value at the top level", True)]
    twice = [ConfigProblem(keys, "given twice; the first is lost", "keep one") for keys in repeated]
    cluster = Cluster(path, raw, lines)
    checks = [*_said(cluster, "keys", [*twice, *_schema(raw)])]
    if any(check.broken for check in checks):
        return checks
    for name, rule in RULES.items():
        checks += _said(cluster, name, list(rule(cluster)))
    return checks


def _said(cluster: Cluster, name: str, faults: list[ConfigProblem]) -> Iterator[Check]:
    if not faults:
        yield Check(f"cluster: {name}", _exposed(cluster) if name == "ports" else "as it should be")
    for fault in faults:
        known = fault.keys
        while known and known not in cluster.lines:
            known = known[:-1]
        line = f":{cluster.lines[known]}" if known else ""
        where = f"{cluster.file.name}{line}: {'.'.join(map(str, fault.keys))}".rstrip(": ")
        yield Check(f"cluster: {name}", f"{where}: {fault.found}", fault.remedy, fault.broken)


def _repeated(node: yaml.Node | None, keys: Keys, lines: dict[Keys, int]) -> Iterator[Keys]:
    """Record the line of each key, and yield keys that stand twice in one mapping; ValueError for too many."""
    if len(lines) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values where its aliases (*name) are written out")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*keys, str(key.value))
            if path in lines and lines[path] != key.start_mark.line + 1:
                yield path
            lines[path] = key.start_mark.line + 1
            yield from _repeated(value, path, lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[*keys, i] = value.start_mark.line + 1
            yield from _repeated(value, (*keys, i), lines)


def _schema(raw: dict[str, Any]) -> Iterator[ConfigProblem]:
    """Yield the errors of Ray's schema by key; a mistyped key with the nearest that exists."""
    file = Path(str(distribution("ray").locate_file("ray/autoscaler/ray-schema.json")))
    schema = json.loads(file.read_text(encoding="utf-8"))
    for error in jsonschema.Draft7Validator(schema).iter_errors(raw):
        keys = tuple(error.absolute_path)
        known = list(error.schema.get("properties", ()))
        if error.validator == "additionalProperties":
            for name in sorted({*map(str, error.instance)} - {*known}):
                yield ConfigProblem(
                    (*keys, name), "no such key", f"allowed: {', '.join(known)}{did_you_mean(name, known)}"
                )
        else:
            yield ConfigProblem(
                keys, error.message, f"see what Ray expects: {error.validator} {error.validator_value}"[:120]
            )
    provider = raw.get("provider")
    known = list(schema["properties"]["provider"]["properties"])
    for name in map(str, provider) if isinstance(provider, dict) else ():
        if name not in known and (like := did_you_mean(name, known)):
            yield ConfigProblem(("provider", name), "no such key, and Ray would ignore it", like.removeprefix("; "))


# Rules


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
    """Each type says its machine; the head is one of the types and has no GPU, and some other type has."""
    wanted = MACHINE.get(cluster.provider, ())
    types, head = cluster.types, cluster.raw.get("head_node_type")
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
    if types and head not in types:
        like = did_you_mean(str(head), types)
        yield ConfigProblem(("head_node_type",), f"{head!r}: no such type", f"allowed: {', '.join(types)}{like}")
    if head in types and _has_gpu(types[head]):
        found = f"the head {head!r} has a GPU, and costs as much all the time"
        yield ConfigProblem(
            ("available_node_types", str(head)), found, "take an instance type without one, and resources GPU: 0"
        )
    blank = any(_blank(machine) for kind in types.values() for machine in kind["node_config"].values())
    if wanted and not blank and not any(_has_gpu(kind) for name, kind in types.items() if name != head):
        yield ConfigProblem(
            ("available_node_types",), "no node type beside the head has a GPU", "give one a GPU instance type"
        )


def _has_gpu(kind: dict[str, Any]) -> bool:
    config = kind["node_config"]
    machine = str(config.get("InstanceType") or config.get("machineType") or config.get("azure_arm_parameters", ""))
    accelerated = bool(config.get("guestAccelerators")) or ("vmSize" in machine and "Standard_N" in machine)
    return kind.get("resources", {}).get("GPU", 0) > 0 or accelerated or bool(GPU_MACHINE.match(machine))


def _scaling(cluster: Cluster) -> Iterator[ConfigProblem]:
    """Yield the machines that would run and cost without work."""
    for name, kind in cluster.types.items():
        here = ("available_node_types", name)
        if name == cluster.raw.get("head_node_type") and (kind.get("min_workers", 0) or kind.get("max_workers", 0)):
            found = "more machines of the head's type"
            yield ConfigProblem((*here, "max_workers"), found, "set min and max_workers to 0")
        elif (low := kind.get("min_workers", 0)) and _has_gpu(kind):
            yield ConfigProblem((*here, "min_workers"), f"{low}: a GPU machine that runs without work", "set it to 0")
    idle = cluster.raw.get("idle_timeout_minutes", IDLE)
    if cluster.provider != "local" and not 0 < idle <= 60:
        found = f"{idle} minutes until a machine without work goes"
        yield ConfigProblem(("idle_timeout_minutes",), found, "1 to 60 spare both restarts and money")


def _sources(cluster: Cluster) -> Iterator[ConfigProblem]:
    """Every file and folder that is mounted exists."""
    for remote, local in cluster.raw.get("file_mounts", {}).items():
        source = _source(cluster, local)
        if not _blank(local) and not os.path.exists(source):
            remedy = f"make it, or mend the path{_like(source)}"
            remedy = "run: ray get-auth-token --generate" if remote == TOKEN else remedy
            yield ConfigProblem(("file_mounts", remote), f"{shown(str(source))[1:-1]} does not exist", remedy)


def _source(cluster: Cluster, local: object) -> Path:
    return cluster.file.resolve().parent / os.path.expanduser(str(local))


def _like(file: Path) -> str:
    there = os.path.isdir(file.parent)
    return did_you_mean(file.name, [path.name for path in file.parent.iterdir()] if there else [])


def _ports(cluster: Cluster) -> Iterator[ConfigProblem]:
    """Nothing that runs code for whoever reaches it is open to everybody, and all of it asks for the token."""
    yield from _open_ports(cluster)
    started = {keys[0] for keys, _ in cluster.starts()}
    for part in STARTS:
        if part not in started:
            found = "no command starts Ray; Ray's own asks for no token"
            yield ConfigProblem((part,), found, "add: RAY_AUTH_MODE=token ray start …")
    for keys, command in cluster.starts():
        for option, port in ports_given(command).items():
            if port > 65535:
                yield ConfigProblem(keys, f"{option}={port}: no port", "write one from 1 to 65535")
        host = re.search(r"--dashboard-host[= ](\S+)", command)
        said = host.group(1).strip("'\"") if host else None
        if said is None and "--head" in command:
            yield ConfigProblem(keys, "no --dashboard-host", "add --dashboard-host=127.0.0.1 to ray start")
        elif said is not None and not re.fullmatch(r"127\.\d+\.\d+\.\d+|localhost|::1", said):
            found = f"--dashboard-host={said}: whoever reaches the dashboard runs code here"
            yield ConfigProblem(
                keys, found, "--dashboard-host=127.0.0.1, and look at it with: ray dashboard cluster.yaml"
            )
        mode = re.search(r"\bRAY_AUTH_MODE=(\S+)\b.*\bray start\b", command, re.DOTALL)
        if mode is None or mode.group(1).strip("'\";") != "token":
            found = f"RAY_AUTH_MODE={mode.group(1)}" if mode else "no RAY_AUTH_MODE"
            remedy = "RAY_AUTH_MODE=token ray start …, in this command: each is a shell of its own"
            yield ConfigProblem(keys, f"{found}: whoever reaches the port runs code here", remedy)


def _firewall(cluster: Cluster) -> list[dict[str, Any]] | None:
    """Return the rules of AWS's security group; None if the file has none."""
    group = cluster.raw["provider"].get("security_group") or {}
    rules: list[dict[str, Any]] | None = group.get("IpPermissions")
    return rules


def _open_ports(cluster: Cluster) -> Iterator[ConfigProblem]:
    rules = _firewall(cluster) or []
    here: Keys = ("provider", "security_group", "IpPermissions")
    for i, rule in enumerate(rules):
        if fault := rule_fault(rule):
            remedy = "write ports as 22, networks as - CidrIp: 10.0.0.0/16"
            yield ConfigProblem((*here, i), fault, remedy)
            return
        if rule.get("PrefixListIds"):
            found = "a prefix list, whose networks are not in this file"
            yield ConfigProblem((*here, i), found, "leave port 22 alone open; use ssh", broken=False)
    for one in opened_to_outside(services_of(command for _, command in cluster.starts()), rules):
        whom = "everybody" if one.everybody else ", ".join(map(str, one.networks))
        keys = (*here, one.rules[0]) if len(one.rules) == 1 else here
        yield ConfigProblem(keys, f"opens {', '.join(one.services)} to {whom}", "leave port 22 alone open; use ssh")


def _exposed(cluster: Cluster) -> str:
    """Say what the file opens, for a report without problems."""
    listening = [*dict.fromkeys(map(str, services_of(command for _, command in cluster.starts())))]
    between = f"between the nodes: {', '.join(listening)}"
    if cluster.provider != "aws":
        return (
            f"the network of {cluster.provider!r} is not in this file; it must keep from others what is open {between}"
        )
    rules = _firewall(cluster)
    if rules is None:
        return f"from outside: 22 (ssh), by the security group that Ray makes; {between}"
    said = [
        f"{rule.get('FromPort', 'all')}-{rule.get('ToPort', 'all')} to {', '.join(map(str, joined(networks_of(rule))))}"
        for rule in rules
        if networks_of(rule)
    ]
    return f"by its security group: {'; '.join(said) or 'nothing'}; {between}"


def _shared_folder(cluster: Cluster) -> Iterator[ConfigProblem]:
    """Yield exports by NFS to others than the nodes or without waiting for the disk, and mounts that give rights."""
    for part, commands in cluster.raw.items():
        if part.endswith("_commands") and isinstance(commands, list):
            for i, command in enumerate(map(str, commands)):
                for found, remedy in [*export_faults(command), *mount_faults(command)]:
                    yield ConfigProblem((part, i), found, remedy)


def _ssh(cluster: Cluster) -> Iterator[ConfigProblem]:
    auth = cluster.raw.get("auth", {})
    if not auth.get("ssh_user"):
        yield ConfigProblem(("auth",), "no ssh_user", "add ssh_user: the image's user, as ubuntu")
    key = auth.get("ssh_private_key")
    if key is None or _blank(key):
        return  # without one Ray makes a key pair of its own
    file = _source(cluster, key)
    if not os.path.isfile(file):
        found = f"{shown(str(file))[1:-1]} does not exist"
        yield ConfigProblem(("auth", "ssh_private_key"), found, f"mend the path{_like(file)}")
    elif file.stat().st_mode & 0o077:
        yield ConfigProblem(
            ("auth", "ssh_private_key"), f"{file}: others can read it, so ssh refuses it", f"chmod 600 {file}"
        )
    for name, kind in cluster.types.items():
        if cluster.provider == "aws" and not kind["node_config"].get("KeyName"):
            found = "no KeyName beside an ssh_private_key: the machine would not let that key in"
            yield ConfigProblem(
                ("available_node_types", name, "node_config"), found, "add KeyName, the pair's name in EC2"
            )


RULES: dict[str, Callable[[Cluster], Iterator[ConfigProblem]]] = {
    "filled in": _blanks,
    "provider": _provider,
    "machines": _machines,
    "scaling": _scaling,
    "sources": _sources,
    "ports": _ports,
    "shared folder": _shared_folder,
    "ssh": _ssh,
}
"""What is looked at once Ray's schema accepts the file, in the order of the report."""
