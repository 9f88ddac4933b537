"""Ports of Ray and NFS on a node, the networks that a firewall lets in to them, and exports of a shared folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from typing import Any, NamedTuple

from viladiff.core.messages import one_line, shown

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
DIGITS = 9
"""Of a port that are read: more are no port either."""
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
        given = ports_given(command)
        for one in RAY:
            if one.head and "--head" not in command:
                continue
            ends = (one.options[0], one.options[-1]) if one.options else ("", "")
            low, high = (given.get(option, default) for option, default in zip(ends, one.ports, strict=True))
            found[one._replace(ports=ANY_PORT if 0 in (low, high) else (low, max(low, high)))] = None
        for listed in re.findall(r"--worker-port-list[= ]['\"]?([\d,]+)", command):
            ports = [int(port[:DIGITS]) for port in listed.split(",") if port]
            found |= {Service("Ray's workers", (port, port)): None for port in ports}
    return [*found, *NFS]


def ports_given(command: str) -> dict[str, int]:
    """Return the ports that the options of a command name, by option."""
    named = re.findall(r"(--[a-z-]*port)[= ]['\"]?(\d+)", command)
    return {option: int(port[:DIGITS]) for option, port in named}


def opened_to_outside(services: Sequence[Service], rules: Sequence[Mapping[str, Any]]) -> Iterator[OpenedServices]:
    """Yield what AWS's ``rules`` together open to networks outside; ranges that are parts of one are joined.

    Each rule is one that ``rule_fault`` passes.
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
    """Return the networks of one rule, as ``rule_fault`` passes it."""
    ranges = [*(rule.get("IpRanges") or ()), *(rule.get("Ipv6Ranges") or ())]
    return [ip_network(str(one.get("CidrIp", one.get("CidrIpv6", ""))).strip(), strict=False) for one in ranges]


def rule_fault(rule: object) -> str:
    """Return why this is no rule of AWS, so that nothing can be said of it; empty for one."""
    if not isinstance(rule, Mapping):
        return f"{shown(rule)} is no rule"
    for name, key in (("IpRanges", "CidrIp"), ("Ipv6Ranges", "CidrIpv6")):
        ranges = rule.get(name) or []
        if not isinstance(ranges, list) or not all(isinstance(one, Mapping) and key in one for one in ranges):
            return f"{name} is {shown(ranges)}, and no list of {key}"
    ports = [rule.get(end) for end in ("FromPort", "ToPort")]
    if not all(port is None or (type(port) is int and -1 <= port <= 65535) for port in ports):
        return f"FromPort and ToPort are {shown(ports)}, and no numbers from -1 to 65535"
    if None not in ports and ports[1] != -1 and ports[0] > ports[1]:  # type: ignore[operator]
        return f"FromPort {ports[0]} is after ToPort {ports[1]}"
    try:
        networks_of(rule)
    except ValueError as error:
        return one_line(str(error))
    return ""


def _inside(network: Network) -> bool:
    return any(network.version == one.version and network.subnet_of(one) for one in INSIDE)  # type: ignore[arg-type]


def _meets(rule: Mapping[str, Any], ports: tuple[int, int]) -> bool:
    protocol = str(rule.get("IpProtocol", "-1")).strip().lower()
    if protocol not in ("-1", "all", "tcp", "udp", "6", "17"):
        return False
    low, high = rule.get("FromPort"), rule.get("ToPort")
    if protocol in ("-1", "all") or -1 in (low, high):
        low = high = None
    return (low or 0) <= ports[1] and ports[0] <= (65535 if high is None else high)


# The shared folder


def export_faults(command: str) -> Iterator[tuple[str, str]]:
    """Yield (fault, remedy) for what a shell command exports by NFS to too many or without waiting for the disk."""
    if not re.search(r"exports\b|\bexportfs\b", command):
        return
    hosts: list[Network] = []
    for host, options in _exports(command):
        words = [word.strip() for word in options.split(",")]
        if "sync" not in words:
            yield f"exports with {options}", "sync: what is acknowledged must be on the disk"
        for word, why in (("no_root_squash", "root of a client"), ("insecure", "any program of a client")):
            if word in words:
                yield f"exports with {word}", f"leave it out: {why} would write as it likes"
        if host in ("", "*"):
            yield f"exports to everybody, as {host or 'no host'!r}", "name the nodes' own subnet"
        elif re.search(r"[*?]", host):
            yield f"exports to {host}, names that whoever has the addresses gives", "name the nodes' own subnet"
        elif re.fullmatch(r"[\da-fA-F.:]+/[\d.]+", host):
            try:
                hosts.append(ip_network(host, strict=False))
            except ValueError as error:
                yield f"exports to {one_line(str(error))}", "write a network as 10.0.0.0/16"
    for network in joined(hosts):
        if network.prefixlen < (WIDEST if network.version == 4 else 4 * WIDEST):
            yield f"exports to {network}, {network.num_addresses:,} addresses", "name the nodes' own subnet"


def _exports(command: str) -> Iterator[tuple[str, str]]:
    """Yield (host, options) of the lines of an exports file in a shell command, and of words of ``exportfs``."""
    yield from re.findall(r"([^\s\"'(]*)\(([^()]*\b(?:rw|ro|a?sync)\b[^()]*)\)", command)
    for options, words in re.findall(r"\bexportfs\b[^;&|]*?-o\s*['\"]?([\w=,]+)['\"]?([^;&|]*)", command):
        yield from ((host.strip("[]"), options) for host in re.findall(r"([^\s'\"]*):/", words))
    # A host without options has those that the system takes for it.
    for host in re.findall(r"(?:^|[\s'\"])/[\w./-]*\s+([\w.:*?-]*[*/][\d.]*)(?=['\"\s]|$)(?!\()", command):
        yield host, "no options"


def mount_faults(command: str) -> Iterator[tuple[str, str]]:
    """Yield (fault, remedy) for an NFS mount from which a program could take rights, or that has devices."""
    for mount in re.findall(r"\bmount\b[^;&|]*\bnfs4?\b[^;&|]*", command):
        options = ",".join(re.findall(r"-o\s*['\"]?([\w=,.]+)", mount)).split(",")
        if missing := [word for word in ("nosuid", "nodev") if word not in options]:
            yield f"mounts without {' and '.join(missing)}", "mount -t nfs4 -o nosuid,nodev …"
