"""The shipped cluster.yaml passes the doctor once filled in; each single thing broken in it is found and placed."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from viladiff.cli import main
from viladiff.cluster import exposure
from viladiff.cluster.config_check import RULES, examine_cluster
from viladiff.core.checks import Check

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "cluster.yaml"
BLANKS = {
    "AWS region": "eu-central-1",
    "one zone": "eu-central-1a",
    "file of the private key": "~/.ssh/viladiff.pem",
    "instance type without": "m7i.xlarge",
    "instance type with a": "g6.xlarge",
    "image id": "ami-0123456789abcdef0",
    "name of the key pair": "viladiff",
}
Tree = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in small and a home with token and key, so that the real ones have no say."""
    home, checkout = tmp_path / "home", tmp_path / "checkout"
    for path in (home / ".ssh", home / ".ray", checkout):
        path.mkdir(parents=True)
    for path in (home / ".ssh" / "viladiff.pem", home / ".ray" / "auth_token"):
        path.touch(0o600)
    for local in yaml.safe_load(SHIPPED.read_text())["file_mounts"].values():
        (checkout / local).mkdir(exist_ok=True) if not local.startswith("~") else None
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (checkout / name).rmdir()
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(checkout)
    return checkout


def filled(text: str) -> str:
    for start, value in BLANKS.items():
        text = re.sub(rf"<{start}[^>]*>", value, text)
    return text


def examined(folder: Path, change: Callable[[Tree], object] | None = None) -> list[Check]:
    text = filled(SHIPPED.read_text())
    if change is not None:
        tree = copy.deepcopy(yaml.safe_load(text))  # without the anchors, or a change of one type would reach the other
        for kind in tree["available_node_types"].values():
            kind["node_config"] = copy.deepcopy(kind["node_config"])
        change(tree)
        text = yaml.safe_dump(tree, sort_keys=False)
    (folder / "cluster.yaml").write_text(text)
    return examine_cluster(folder / "cluster.yaml")


def broken(checks: list[Check]) -> list[Check]:
    return [check for check in checks if check.broken]


def test_shipped_file_passes_once_filled_in(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = examined(folder)
    assert [check for check in checks if check.remedy] == []
    assert {check.name.removeprefix("cluster: ") for check in checks} == {"keys", *RULES}
    assert main.main(["doctor", "--cluster", "cluster.yaml"]) == 0
    assert "cluster: ssh" in capsys.readouterr().out


def test_shipped_file_as_it_is_has_blanks_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = SHIPPED.read_text()
    (folder / "cluster.yaml").write_text(text)
    found = broken(examine_cluster("cluster.yaml"))
    assert {check.name for check in found} == {"cluster: filled in"} and len(found) == 9
    numbers = [int(re.search(r"cluster\.yaml:(\d+): ", check.found).group(1)) for check in found]  # type: ignore[union-attr]
    assert all(re.search(r"<.*>|\*image|\*key", text.splitlines()[number - 1]) for number in numbers)
    assert main.main(["doctor", "--cluster", "cluster.yaml"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_shipped_file_mounts_all_that_runs() -> None:
    mounted = set(yaml.safe_load(SHIPPED.read_text())["file_mounts"].values())
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in done.stdout.splitlines()}
    assert {local for local in mounted if not local.startswith("~")} <= top | {".git", "ablations"}
    people = {"docs", "mkdocs.yml", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"}
    other_machines = {".ci", ".github", "Dockerfile", ".dockerignore"}
    assert top - mounted <= {"Makefile", "benchmarks", "cluster.yaml", "tests"} | people | other_machines


def head(tree: Tree) -> Tree:
    return tree["available_node_types"]["head"]


def gpu(tree: Tree) -> Tree:
    return tree["available_node_types"]["gpu"]


def rename(tree: Tree, old: str, new: str) -> None:
    tree[new] = tree.pop(old)


def in_command(part: str, old: str, new: str) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        assert any(old in command for command in tree[part]), old
        tree[part] = [command.replace(old, new) for command in tree[part]]

    return change


def without(part: str, piece: str) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        left = [command for command in tree[part] if piece not in command]
        assert len(left) == len(tree[part]) - 1
        tree[part] = left

    return change


def opened(low: int, high: int, cidr: str = "0.0.0.0/0", protocol: str = "tcp") -> Callable[[Tree], None]:
    rule = {"FromPort": low, "ToPort": high, "IpProtocol": protocol, "IpRanges": [{"CidrIp": cidr}]}
    return lambda tree: tree["provider"].update(security_group={"GroupName": "g", "IpPermissions": [rule]})


def several(*ranges: tuple[int, int, str]) -> Callable[[Tree], None]:
    rules = [
        {"FromPort": low, "ToPort": high, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": cidr}]}
        for low, high, cidr in ranges
    ]
    return lambda tree: tree["provider"].update(security_group={"GroupName": "g", "IpPermissions": rules})


def odd(**more: object) -> Callable[[Tree], None]:
    """A rule that lets everybody in, with other values."""
    rule = {"IpProtocol": "tcp", "FromPort": 6379, "ToPort": 6379, "IpRanges": [{"CidrIp": "0.0.0.0/0"}], **more}
    return lambda tree: tree["provider"].update(security_group={"IpPermissions": [rule]})


def moved(tree: Tree) -> None:
    """Ray's head and metrics at ports of their own, which are open."""
    in_command(HEAD, "--port=6379", "--port=7000 --metrics-export-port 7001")(tree)
    several((7000, 7001, "0.0.0.0/0"))(tree)


SETUP = "head_setup_commands"
HEAD, WORKER = "head_start_ray_commands", "worker_start_ray_commands"
MUTATIONS: dict[str, tuple[Callable[[Tree], object], str, str]] = {
    # name: change, rule that must find it, what the finding and its remedy must say
    "mistyped key": (
        lambda t: rename(t, "max_workers", "max_wrokers"),
        "keys",
        "max_wrokers.*did you mean 'max_workers'",
    ),
    "mistyped type key": (
        lambda t: rename(gpu(t), "min_workers", "min_worker"),
        "keys",
        r"types\.gpu\.min_worker.*'min_w",
    ),
    "mistyped provider key": (lambda t: rename(t["provider"], "region", "regoin"), "keys", "regoin.*'region'"),
    "text for a number": (lambda t: t.update(max_workers="four"), "keys", "max_workers.*'four'.*integer"),
    "no provider": (lambda t: t.pop("provider"), "keys", "'provider' is a required"),
    "unknown provider": (
        lambda t: t["provider"].update(type="awz"),
        "provider",
        "'awz': these checks know.*did you mean 'aws'",
    ),
    "unknown head type": (
        lambda t: t.update(head_node_type="hed"),
        "machines",
        "head_node_type.*'hed': no such type.*did you mean 'head'",
    ),
    "blank": (lambda t: gpu(t)["node_config"].update(InstanceType="<type>"), "filled in", "gpu.*<type>.*fill it in"),
    "no region": (lambda t: t["provider"].pop("region"), "provider", "no region.*add region"),
    "empty region": (lambda t: t["provider"].update(region=""), "provider", "no region"),
    "zone for region": (
        lambda t: t["provider"].update(region="eu-central-1a"),
        "provider",
        "eu-central-1a.*not a zone",
    ),
    "no instance type": (lambda t: gpu(t)["node_config"].pop("InstanceType"), "machines", "gpu.*no InstanceType"),
    "mistyped machine": (
        lambda t: rename(head(t)["node_config"], "InstanceType", "InstanceTyp"),
        "machines",
        "did you mean 'InstanceTyp'",
    ),
    "no image": (lambda t: head(t)["node_config"].pop("ImageId"), "machines", "head.*no ImageId"),
    "head with GPU": (
        lambda t: head(t)["node_config"].update(InstanceType="g6.xlarge"),
        "machines",
        "'head' has a GPU",
    ),
    "head says GPU": (lambda t: head(t)["resources"].update(GPU=1), "machines", "'head' has a GPU"),
    "no GPU at all": (lambda t: gpu(t)["node_config"].update(InstanceType="m7i.large"), "machines", "beside the head"),
    "no types": (
        lambda t: (t.pop("available_node_types"), t.pop("head_node_type")),
        "machines",
        "no available_node_types",
    ),
    "GPU never 0": (lambda t: gpu(t).update(min_workers=1), "scaling", "without work.*set it to 0"),
    "many heads": (lambda t: head(t).update(max_workers=1), "scaling", "head's type"),
    "never idle": (lambda t: t.update(idle_timeout_minutes=600), "scaling", "600 minutes"),
    "source gone": (
        lambda t: t["file_mounts"].update({"~/viladiff/scripts": "scripst"}),
        "sources",
        "scripst.*'scripts'",
    ),
    "source of another home": (
        lambda t: t["file_mounts"].update({"~/a": "~nobody-here/a"}),
        "sources",
        "~nobody-here/a",
    ),
    "source a number": (lambda t: t["file_mounts"].update({"~/a": 5}), "sources", "5 does not exist"),
    "open dashboard": (in_command(HEAD, "host=127.0.0.1", "host=0.0.0.0"), "ports", r"0\.0\.0\.0: whoever"),
    "dashboard left out": (in_command(HEAD, "--dashboard-host=127.0.0.1 ", ""), "ports", "no --dashboard-host"),
    "dashboard of worker": (
        in_command(WORKER, "ray start", "ray start --dashboard-host 0.0.0.0"),
        "ports",
        "worker",
    ),
    "no token on head": (in_command(HEAD, "RAY_AUTH_MODE=token ", ""), "ports", r"head_start.*no RAY_AUTH_MODE"),
    "no token on workers": (in_command(WORKER, "RAY_AUTH_MODE=token ", ""), "ports", r"worker_start.*no RAY_AUTH_MODE"),
    "token off": (in_command(HEAD, "MODE=token", "MODE=disabled"), "ports", "RAY_AUTH_MODE=disabled"),
    "token after start": (
        in_command(HEAD, "RAY_AUTH_MODE=token ray start", "ray start; RAY_AUTH_MODE=token true"),
        "ports",
        "no RA",
    ),
    "no start": (without(WORKER, "ray start"), "ports", "worker_start.*no command starts Ray"),
    "open port": (opened(8265, 8265), "ports", r"IpPermissions\.0: opens 8265 \(the dashboard\)"),
    "open range": (opened(0, 65535), "ports", "6379.*8265.*10001"),
    "all open": (opened(-1, -1, protocol="-1"), "ports", "10001"),
    "halves of all": (
        several((6379, 6379, "0.0.0.0/1"), (22, 6500, "128.0.0.0/1")),
        "ports",
        r"IpPermissions: opens 6379 \(Ray's head\) to everybody",
    ),
    "halves of IPv6": (
        lambda t: t["provider"].update(
            security_group={
                "IpPermissions": [
                    {"IpProtocol": "tcp", "FromPort": 1, "ToPort": 9999, "Ipv6Ranges": [{"CidrIpv6": one}]}
                    for one in ("::/1", "8000::/1")
                ]
            }
        ),
        "ports",
        "6379.* to everybody",
    ),
    "half of all": (opened(8265, 8265, "0.0.0.0/1"), "ports", r"8265 \(the dashboard\) to 0\.0\.0\.0/1"),
    "an office": (opened(8265, 8265, "203.0.113.0/24"), "ports", r"to 203\.0\.113\.0/24"),
    "no network": (opened(22, 22, "0.0.0.0/33"), "ports", r"0\.0\.0\.0/33.*10\.0\.0\.0/16"),
    "ports as text": (
        odd(FromPort="6379", ToPort="6379"),
        "ports",
        r"IpPermissions\.0: FromPort and ToPort are \['6379'",
    ),
    "ports reversed": (odd(FromPort=7000, ToPort=6000), "ports", "FromPort 7000 is after ToPort 6000"),
    "ports of null": (odd(FromPort=None, ToPort=None), "ports", "opens 6379.*to everybody"),
    "all protocols": (odd(IpProtocol="all", FromPort=22), "ports", "opens 6379.*to everybody"),
    "networks as text": (odd(IpRanges="0.0.0.0/0"), "ports", "IpRanges is '0.0.0.0/0', and no list of CidrIp"),
    "networks as a mapping": (odd(IpRanges={"CidrIp": "::/0"}), "ports", "IpRanges is .*and no list"),
    "networks as list of text": (odd(IpRanges=["0.0.0.0/0"]), "ports", "IpRanges is .*and no list"),
    "a rule of text": (
        lambda t: t["provider"].update(security_group={"IpPermissions": ["tcp"]}),
        "ports",
        r"IpPermissions\.0: 'tcp' is no rule",
    ),
    "no port": (in_command(HEAD, "--port=6379", "--port=99999"), "ports", "--port=99999: no port"),
    "a port of many digits": (in_command(HEAD, "--port=6379", f"--port={'9' * 5000}"), "ports", "no port"),
    "open workers": (opened(15000, 15000), "ports", "10002-19999 .Ray's workers"),
    "open agent": (opened(52365, 52365), "ports", "52365 .the dashboard's agent"),
    "open own choice": (
        opened(40000, 40001),
        "ports",
        "object manager.*node manager.*agent of environments.*Ray's metrics",
    ),
    "open metrics": (opened(44217, 44227), "ports", "44217 .the autoscaler's.*44227 .the dashboard's metrics"),
    "open NFS": (opened(2049, 2049), "ports", r"opens 2049 \(NFS\)"),
    "open rpcbind": (opened(111, 111, protocol="udp"), "ports", r"opens 111 \(NFS, rpcbind\)"),
    "open mountd": (opened(20048, 20048), "ports", r"opens 20048 \(NFS, mountd\)"),
    "moved ports": (moved, "ports", r"opens 7000 \(Ray's head\), 7001 \(Ray's metrics\) to everybody"),
    "export without waiting": (in_command(SETUP, "rw,sync", "rw,async"), "shared folder", "async.*on the disk"),
    "export by default": (in_command(SETUP, "(rw,sync,", "(rw,"), "shared folder", "exports with rw,no_sub.*sync"),
    "export to all": (in_command(SETUP, "$subnet(", "*("), "shared folder", "to everybody, as '\\*'"),
    "export to nobody named": (in_command(SETUP, "$subnet(", "("), "shared folder", "to everybody, as 'no host'"),
    "export to ten": (in_command(SETUP, "$subnet(", "10.0.0.0/8("), "shared folder", "10.0.0.0/8, 16,777,216 addr"),
    "export to halves": (
        in_command(SETUP, "/shared $subnet(", "/shared 10.0.0.0/16(rw,sync) 10.1.0.0/16("),
        "shared folder",
        "exports to 10.0.0.0/15",
    ),
    "export to a mask": (
        in_command(SETUP, "$subnet(", "10.0.0.0/255.0.0.0("),
        "shared folder",
        "exports to 10.0.0.0/8",
    ),
    "export to no network": (
        in_command(SETUP, "$subnet(", "999.0.0.0/8("),
        "shared folder",
        r"'999.0.0.0/8' does not appear.*write a network as 10\.0\.0\.0/16",
    ),
    "export to names": (
        in_command(SETUP, "$subnet(", "*.example.org("),
        "shared folder",
        r"to \*\.example\.org, names",
    ),
    "export of a command": (
        in_command(SETUP, "exportfs -ra", "exportfs -o rw,async *:/shared"),
        "shared folder",
        "exports with rw,async.*on the disk",
    ),
    "export without options": (
        in_command(SETUP, '"/shared $subnet(rw,sync,no_subtree_check)"', "'/shared 0.0.0.0/0'"),
        "shared folder",
        "exports with no options",
    ),
    "export to root": (in_command(SETUP, "rw,", "rw,no_root_squash,"), "shared folder", "no_root_squash"),
    "mount with rights": (in_command(WORKER, "nosuid,", ""), "shared folder", "worker_start.*without nosuid"),
    "mount with devices": (in_command(WORKER, ",nodev", ""), "shared folder", "without nodev"),
    "mount without options": (
        in_command(WORKER, "-o nosuid,nodev ", ""),
        "shared folder",
        "without nosuid and nodev",
    ),
    "a key of a long name": (lambda t: t["auth"].update(ssh_private_key="k" * 5000), "ssh", "does not exist"),
    "no key file": (
        lambda t: t["auth"].update(ssh_private_key="~/.ssh/viladif.pem"),
        "ssh",
        "viladif.pem.*'viladiff.pem'",
    ),
    "key without name": (lambda t: gpu(t)["node_config"].pop("KeyName"), "ssh", "gpu.*no KeyName"),
    "no user": (lambda t: t["auth"].pop("ssh_user"), "ssh", "no ssh_user"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_single_fault_is_found_and_placed(name: str, folder: Path) -> None:
    change, rule, says = MUTATIONS[name]
    found = broken(examined(folder, change))
    told = [f"{check.found} | {check.remedy}" for check in found if check.name == f"cluster: {rule}"]
    assert any(re.search(says, text) for text in told), [*found]
    assert all(check.found.startswith("cluster.yaml") and check.remedy for check in found)


def test_every_rule_is_shown_to_find_something() -> None:
    assert {rule for _, rule, _ in MUTATIONS.values()} == {"keys", *RULES}


@pytest.mark.parametrize(
    "change",
    [
        opened(22, 22),
        opened(0, 65535, "10.0.0.0/8"),
        several((0, 65535, "172.16.0.0/13"), (0, 65535, "172.24.0.0/13")),
        opened(-1, -1, protocol="icmp"),
    ],
    ids=["ssh", "inside", "halves of inside", "ping"],
)
def test_rules_that_open_nothing_to_everybody_pass(folder: Path, change: Callable[[Tree], None]) -> None:
    assert broken(examined(folder, change)) == []


def ports_line(folder: Path, change: Callable[[Tree], object] | None = None) -> str:
    (check,) = [check for check in examined(folder, change) if check.name == "cluster: ports"]
    assert not check.remedy
    return check.found


def test_what_is_exposed_is_said(folder: Path) -> None:
    every = ["6379", "8265", "10001", "10002-19999", "52365", "44217", "44227", "2049", "111", "20048", "own choice"]
    shipped = ports_line(folder)
    assert shipped.startswith("from outside: 22 (ssh), by the security group that Ray makes; between the nodes: ")
    assert [one for one in every if one not in shipped] == []
    group = several((22, 22, "0.0.0.0/1"), (22, 22, "10.0.0.0/8"))
    assert ports_line(folder, group).startswith("by its security group: 22-22 to 0.0.0.0/1; 22-22 to 10.0.0.0/8; ")

    def local(tree: Tree) -> None:
        tree["provider"] = {"type": "local", "head_ip": "10.0.0.2", "worker_ips": []}
        del tree["available_node_types"], tree["head_node_type"]

    assert ports_line(folder, local).startswith("the network of 'local' is not in this file; it must keep from others")


def test_a_list_of_networks_of_the_provider_is_noted(folder: Path) -> None:
    rule = {"FromPort": 1, "ToPort": 9999, "IpProtocol": "tcp", "PrefixListIds": [{"PrefixListId": "pl-1"}]}
    checks = examined(folder, lambda tree: tree["provider"].update(security_group={"IpPermissions": [rule]}))
    (check,) = [check for check in checks if check.remedy]
    assert not check.broken and "a prefix list" in check.found


def test_every_port_of_ray_start_is_known() -> None:
    """A port that a later release adds is missed here."""
    program = "import sys; from ray.scripts.scripts import main; sys.argv = ['ray', 'start', '--help']; main()"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=280).stdout
    options = set(re.findall(r"^ +(--[a-z-]*port) ", said, re.MULTILINE))
    assert len(options) >= 11 and options == {option for one in exposure.RAY for option in one.options}


def test_worker_ports_may_be_listed() -> None:
    found = exposure.services_of(["ray start --head --worker-port-list=7,9", "ray start --address=a:1"])
    assert {(7, 7), (9, 9)} <= {one.ports for one in found}
    assert exposure.services_of([]) == exposure.services_of(["ray start --head"])
    assert exposure.ANY_PORT in {one.ports for one in exposure.services_of(["ray start --head --port=0"]) if one.head}


TOOLS = {
    "sudo": 'exec "$@"',
    "apt-get": "exit 0",
    "exportfs": "exit 0",
    "tee": 'cat > "$EXPORTS"',
    "ip": """case "$*" in
*default*) echo "default via 10.0.16.1 dev ens5 proto dhcp metric 512"; echo "default via 10.9.0.1 dev b" ;;
*"dev ens5"*) echo "10.0.0.2 proto dhcp src 10.0.20.5"; [ -z "$SUBNET" ] || echo "$SUBNET proto kernel src 10.0.20.5" ;;
esac""",
}


@pytest.mark.parametrize("subnet", ["10.0.16.0/20", ""])
def test_the_export_is_for_the_heads_own_subnet(tmp_path: Path, subnet: str) -> None:
    (command,) = [one for one in yaml.safe_load(SHIPPED.read_text())[SETUP] if "exports" in one]
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in TOOLS.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    written = tmp_path / "exports"
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "EXPORTS": str(written), "SUBNET": subnet}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    if subnet:
        assert written.read_text() == "/shared 10.0.16.0/20(rw,sync,no_subtree_check)\n", done.stderr
    else:
        assert done.returncode and not written.exists(), "an export without a host is for everybody"


def test_key_that_others_can_read_is_refused(folder: Path) -> None:
    (folder.parent / "home" / ".ssh" / "viladiff.pem").chmod(0o644)
    (check,) = broken(examined(folder))
    assert check.name == "cluster: ssh" and check.remedy.startswith("chmod 600")


def test_missing_token_says_how_to_make_one(folder: Path) -> None:
    (folder.parent / "home" / ".ray" / "auth_token").unlink()
    (check,) = broken(examined(folder))
    assert check.remedy == "run: ray get-auth-token --generate" and "auth_token" in check.found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1", "cluster.yaml:1"),
        ("- a\n- b\n", "not a mapping"),
        ("cluster_name: a\ncluster_name: b\nprovider: {type: aws}\n", "cluster.yaml:2: cluster_name: given twice"),
        ("a: &a\n  - *a\n", "nested too deeply"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
            r"more than 20,000 values where its aliases \(\*name\)",
        ),
        ("a: " + "[" * 9000 + "]" * 9000, "nested too deeply"),
        ("[" * 3000, "cluster.yaml: nested too deeply"),
        ("cluster_name: a\nprovider: {type: aws}\n5: b\n", "cluster.yaml:3: 5: no such key"),
        ("cluster_name: a\nprovider: {type: aws}\n~: b\n", "cluster.yaml.*None: no such key"),
        ("a: 2001-99-99", "cluster.yaml: month must be in 1..12"),
        ("!!python/object/apply:os.system ['touch bad']\n", "cluster.yaml:1.*python/object"),
    ],
)
def test_text_that_is_no_cluster_is_one_line(folder: Path, text: str, says: str) -> None:
    (folder / "cluster.yaml").write_text(text)
    found = broken(examine_cluster(folder / "cluster.yaml"))
    assert len(found) == 1 and re.search(says, found[0].found)
    assert not (folder / "bad").exists()


def test_missing_file_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor", "--cluster", "clutser.yaml"]) == 2
    assert "clutser.yaml" in capsys.readouterr().err
