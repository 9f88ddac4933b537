"""Ports of Ray and NFS on a node, the networks that a firewall lets in to them, and exports of a shared folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from typing import Any, NamedTuple

Network = IPv4Network | IPv6Network
ANY_PORT = (32768, 60999)
"""The range from which Linux gives a port to a process that names none."""


class Service(NamedTuple):
    """What listens on a node."""

    name: str
    ports: tuple[int, int]
    """First and last."""
    options: tuple[str, ...] = ()
    """Options of ``ray start`` that set them: one for both, or one for each."""
    head: bool = False
    """Whether the head alone has it."""

    def __str__(self) -> str:
        low, high = self.ports
        ports = "a port of its own choice" if self.ports == ANY_PORT else str(low) if low == high else f"{low}-{high}"
        return f"{ports} ({self.name})"


RAY = (
    Service("Ray's head", (6379, 6379), ("--port",), True),
    Service("the dashboard", (8265, 8265), ("--dashboard-port",), True),
    Service("Ray's clients", (10001, 10001), ("--ray-client-server-port",), True),
    Service("Ray's workers", (10002, 19999), ("--min-worker-port", "--max-worker-port")),
    Service("the dashboard's agent", (52365, 52365), ("--dashboard-agent-listen-port",)),
    Service("the dashboard's agent, gRPC", ANY_PORT, ("--dashboard-agent-grpc-port",)),
    Service("the object manager", ANY_PORT, ("--object-manager-port",)),
    Service("the node manager", ANY_PORT, ("--node-manager-port",)),
    Service("the agent of environments", ANY_PORT, ("--runtime-env-agent-port",)),
    Service("Ray's metrics", ANY_PORT, ("--metrics-export-port",)),
    Service("the autoscaler's metrics", (44217, 44217), (), True),
    Service("the dashboard's metrics", (44227, 44227), (), True),
)
"""As Ray's documentation has them ("Configuring Ray", ports); ``ray start --help`` lists the options."""
NFS = (
    Service("NFS", (2049, 2049)),
    Service("NFS, rpcbind", (111, 111)),
    Service("NFS, mountd", (20048, 20048)),
    Service("NFS, mountd", ANY_PORT),
)
INSIDE = tuple(
    map(
        ip_network,
        ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "127.0.0.0/8", "fc00::/7", "fe80::/10"),
    )
)
"""Networks that no provider routes from the internet."""
WIDEST = 16
"""Shortest prefix of a subnet of the nodes: AWS has none that is larger."""


class OpenedServices(NamedTuple):
    """Services that some rules of a firewall open together to the same networks."""

    services: list[str]
    networks: list[Network]
    rules: list[int]
    """Places of the rules in the list."""

    @property
    def everybody(self) -> bool:
        return any(network.prefixlen == 0 for network in self.networks)


def services_of(commands: Iterable[str]) -> list[Service]:
    """Return what listens on nodes that the commands start, each with ``ray start``, at the ports that they give."""
    found: dict[Service, None] = {}
    for command in [*commands] or ["ray start --head"]:
        given = {option: int(port) for option, port in re.findall(r"(--[a-z-]*port)[= ]['\"]?(\d+)", command)}
        for one in RAY:
            if one.head and "--head" not in command:
                continue
            ends = (one.options[0], one.options[-1]) if one.options else ("", "")
            low, high = (given.get(option, default) for option, default in zip(ends, one.ports, strict=True))
            found[one._replace(ports=ANY_PORT if 0 in (low, high) else (low, max(low, high)))] = None
        for listed in re.findall(r"--worker-port-list[= ]['\"]?([\d,]+)", command):
            found |= {Service("Ray's workers", (int(port), int(port))): None for port in listed.split(",") if port}
    return [*found, *NFS]


def opened_to_outside(services: Sequence[Service], rules: Sequence[Mapping[str, Any]]) -> Iterator[OpenedServices]:
    """Yield what AWS's ``rules`` together open to networks outside; ranges that are parts of one are joined.

    Raises ValueError for a range that is no network.
    """
    found: dict[tuple[Network, ...], OpenedServices] = {}
    for service in services:
        hit = [i for i, rule in enumerate(rules) if _meets(rule, service.ports)]
        outside = [network for i in hit for network in networks_of(rules[i]) if not _inside(network)]
        networks = joined(outside)
        if networks:
            places = [i for i in hit if any(not _inside(network) for network in networks_of(rules[i]))]
            one = found.setdefault(tuple(networks), OpenedServices([], networks, []))
            one.services.append(str(service))
            one.rules.extend(i for i in places if i not in one.rules)
    yield from found.values()


def joined(networks: Iterable[Network]) -> list[Network]:
    """Return the networks with neighbours joined: 0.0.0.0/1 and 128.0.0.0/1 are all addresses."""
    every = list(networks)
    four = [one for one in every if isinstance(one, IPv4Network)]
    six = [one for one in every if isinstance(one, IPv6Network)]
    return [*collapse_addresses(four), *collapse_addresses(six)]


def networks_of(rule: Mapping[str, Any]) -> list[Network]:
    """Return the networks of one rule. Raises ValueError for a range that is none."""
    ranges = [*(rule.get("IpRanges") or ()), *(rule.get("Ipv6Ranges") or ())]
    return [ip_network(str(one.get("CidrIp", one.get("CidrIpv6", ""))).strip(), strict=False) for one in ranges]


def _inside(network: Network) -> bool:
    return any(network.version == one.version and network.subnet_of(one) for one in INSIDE)  # type: ignore[arg-type]


def _meets(rule: Mapping[str, Any], ports: tuple[int, int]) -> bool:
    protocol = str(rule.get("IpProtocol", "-1")).lower()
    if protocol not in ("-1", "tcp", "udp", "6", "17"):
        return False
    low, high = rule.get("FromPort", 0), rule.get("ToPort", 65535)
    if protocol == "-1" or low == -1:
        low, high = 0, 65535
    return bool(low <= ports[1] and ports[0] <= high)


# The shared folder


def export_faults(command: str) -> Iterator[tuple[str, str]]:
    """Yield (fault, remedy) for what a shell command exports by NFS to too many or without waiting for the disk."""
    if not re.search(r"exports\b|\bexportfs\b", command):
        return
    hosts: list[Network] = []
    for host, options in re.findall(r"([^\s\"'(]*)\(([^()]*\b(?:rw|ro|a?sync)\b[^()]*)\)", command):
        words = [word.strip() for word in options.split(",")]
        if "sync" not in words:
            yield f"exports with {options}", "sync: what is acknowledged must be on the disk"
        for word, why in (("no_root_squash", "root of a client"), ("insecure", "any program of a client")):
            if word in words:
                yield f"exports with {word}", f"leave it out: {why} would write as it likes"
        if host in ("", "*"):
            yield f"exports to everybody, as {host or 'no host'!r}", "name the nodes' own subnet"
        elif re.fullmatch(r"[\da-fA-F.:]+/\d+", host):
            hosts.append(ip_network(host, strict=False))
    for network in joined(hosts):
        if network.prefixlen < (WIDEST if network.version == 4 else 4 * WIDEST):
            yield f"exports to {network}, {network.num_addresses:,} addresses", "name the nodes' own subnet"


def mount_faults(command: str) -> Iterator[tuple[str, str]]:
    """Yield (fault, remedy) for an NFS mount from which a program could take rights, or that has devices."""
    for mount in re.findall(r"\bmount\b[^;&|]*\bnfs4?\b[^;&|]*", command):
        options = ",".join(re.findall(r"-o\s*['\"]?([\w=,.]+)", mount)).split(",")
        if missing := [word for word in ("nosuid", "nodev") if word not in options]:
            yield f"mounts without {' and '.join(missing)}", "mount -t nfs4 -o nosuid,nodev …"
