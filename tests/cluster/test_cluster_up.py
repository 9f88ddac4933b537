"""The shipped cluster.yaml brought up for real: two nodes of this machine, each with its own addresses and processes.

Each node is an sshd in namespaces of its own, so that it has an address, a home and a list of processes that are not
this machine's: `ray stop` on it sees its own Ray alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from viladiff.cluster.config_check import examine_cluster

ROOT = Path(__file__).resolve().parents[2]
HEAD, WORKER = "10.99.0.2", "10.99.0.3"
SITE = sysconfig.get_path("purelib")

NETWORK = """
set -eu
ip link set lo up
ip link add br0 type bridge
ip addr add 10.99.0.1/24 dev br0
ip link set br0 up
mkdir -p "$W/client/upper" "$W/client/work" "$W/client/ray" /tmp/ray
mount -t overlay overlay -o "lowerdir=$HOME,upperdir=$W/client/upper,workdir=$W/client/work" "$HOME"
mount --bind "$W/client/ray" /tmp/ray
rm -rf "$HOME/.ray"
outside=$(readlink /proc/self/ns/net)
for n in 2 3; do
    unshare --net --mount --pid --fork --mount-proc --kill-child bash "$W/node.sh" $n &
    until [ "$(readlink /proc/$!/ns/net)" != "$outside" ]; do sleep 0.05; done
    ip link add v$n type veth peer name e$n
    ip link set e$n netns $!
    ip link set v$n master br0 up
done
touch "$W/ready"
wait
"""
NODE = """
set -eu
n=$1
ip link set lo up
until ip link show e$n >/dev/null 2>&1; do sleep 0.05; done
ip addr add 10.99.0.$n/24 dev e$n
ip link set e$n up
ip route add default via 10.99.0.1
for folder in "$HOME" /usr/local/bin; do
    own=$W/node$n/$(basename "$folder")
    mkdir -p "$own/upper" "$own/work"
    mount -t overlay overlay -o "lowerdir=$folder,upperdir=$own/upper,workdir=$own/work" "$folder"
done
echo > "$HOME/.bashrc"
echo > "$HOME/.profile"  # as on a fresh image, whatever this machine's shells do first
mkdir -p "$W/node$n/ray" /run/sshd
mount --bind "$W/node$n/ray" /tmp/ray
/usr/sbin/sshd -D -f /dev/null -h "$W/host_key" -E "$W/node$n/sshd.log" -o ListenAddress=10.99.0.$n -o UsePAM=no \\
    -o StrictModes=no -o AuthorizedKeysFile="$W/key.pub" -o PermitRootLogin=prohibit-password -o PidFile=none \\
    -o MaxSessions=99 &
while :; do wait || sleep 1; done
"""


class Machines(NamedTuple):
    """The driver's machine and the two nodes, as processes of this one."""

    pid: int
    """The first process of the driver's namespaces, which see those of the nodes."""
    checkout: Path

    def run(self, *words: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        enter = ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", f"--wd={self.checkout}", "env"]
        given = [f"{name}={value}" for name, value in ({"PATH": path} | environment).items()]
        return subprocess.run([*enter, *given, *words], capture_output=True, text=True, timeout=timeout)

    def ray(self, *words: str, timeout: float = 300) -> str:
        done = self.run("ray", *words, timeout=timeout)
        assert done.returncode == 0, f"ray {' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def daemons(self) -> list[str]:
        """Ray's own processes on both nodes."""
        names = self.run("ps", "-eo", "comm=").stdout.split()
        return [name for name in names if name.startswith(("raylet", "gcs_server"))]


def on_this_machine(tree: dict, key: Path) -> dict:
    """The shipped file with this machine's two nodes, and without what needs a cloud, root's sudo or a download."""
    pip = "pip install --quiet --disable-pip-version-check"
    linked = (
        f"test -x ~/viladiff-env/bin/python || ({sys.executable} -m venv --without-pip ~/viladiff-env"
        f" && echo {SITE} > $(echo ~/viladiff-env/lib/python3*/site-packages)/here.pth"
        " && printf '#!%s\\nfrom ray.scripts.scripts import main\\nmain()\\n' ~/viladiff-env/bin/python"
        " > ~/viladiff-env/bin/ray && chmod +x ~/viladiff-env/bin/ray)"
    )

    def here(command: str) -> str | None:
        if re.search(r"apt-get|boto3|/shared|cloud-init", command):
            return None
        command = linked if "-m venv" in command else command.replace("sudo ", "")
        offline = "python -m pip install --quiet --no-index --no-deps --no-build-isolation"
        command = command.replace(pip, offline)
        command = command.replace("ray start", "ray start --object-store-memory=100000000")
        if "--head" in command:
            return command.replace("ray start", "RAY_enable_autoscaler_v2=0 ray start --num-cpus=0")
        return command.replace("ray start", "ray start --num-cpus=2")

    for name in [name for name in tree if name.endswith("_commands")]:
        tree[name] = [changed for command in tree[name] if (changed := here(command)) is not None]
    del tree["available_node_types"], tree["head_node_type"]
    tree["provider"] = {"type": "local", "head_ip": HEAD, "worker_ips": [WORKER]}
    tree["auth"] = {"ssh_user": "root", "ssh_private_key": str(key)}
    return tree | {"max_workers": 1}


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    missing = [tool for tool in ("/usr/sbin/sshd", "rsync", "ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing or os.geteuid():
        pytest.skip(f"needs root and {', '.join(missing) or 'namespaces'}")
    work, checkout = tmp_path / "w", tmp_path / "checkout"
    work.mkdir()
    subprocess.run(["git", "clone", "--quiet", ROOT, checkout], check=True)
    shutil.copytree(ROOT / "viladiff", checkout / "viladiff", dirs_exist_ok=True)
    shutil.copy(ROOT / "cluster.yaml", checkout)
    (checkout / "ablations").mkdir(exist_ok=True)
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", work / name], check=True)
    (work / "node.sh").write_text(NODE)
    (work / "network.sh").write_text(NETWORK)
    enter = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "bash"]
    outer = subprocess.Popen([*enter, work / "network.sh"], env=os.environ | {"W": str(work)})
    try:
        deadline = time.monotonic() + 20
        while not (work / "ready").exists():
            if outer.poll() is not None or time.monotonic() > deadline:
                pytest.skip("this machine makes no namespaces with a network of their own")
            time.sleep(0.05)
        (child,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        tree = on_this_machine(yaml.safe_load((checkout / "cluster.yaml").read_text()), work / "key")
        (checkout / "here.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        yield Machines(int(child), checkout)
    finally:
        outer.kill()
        outer.wait()


WORK = """
import json, ray, socket, subprocess
ray.init(address="auto", log_to_driver=False)

@ray.remote(num_cpus=1)
def where():
    import time
    import viladiff.runs.record
    time.sleep(2)
    return ray.util.get_node_ip_address(), viladiff.runs.record.__file__,
       viladiff.core.environment.git_state().get("revision")

print("FOUND", json.dumps(ray.get([where.remote(), where.remote()])))
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_cluster_comes_up_works_and_goes_down(machines: Machines) -> None:
    seconds: dict[str, float] = {}

    def timed(name: str, *words: str) -> str:
        started = time.monotonic()
        out = machines.ray(*words)
        seconds[name] = time.monotonic() - started
        return out

    # Ray gives a node 15 s to start its agents, whatever else the processor does: this wants a quiet machine.
    machines.ray("get-auth-token", "--generate")
    timed("up", "up", "-y", "here.yaml")
    started = time.monotonic()
    while (nodes := machines.daemons()).count("raylet") < 2:
        assert time.monotonic() - started < 600, (nodes, machines.ray("exec", "here.yaml", "ray status"))
        time.sleep(2)  # asking Ray itself would take a second of a busy processor each time
    while "2.0 CPU" not in (status := machines.ray("exec", "here.yaml", "ray status")):
        assert time.monotonic() - started < 600, status
        time.sleep(20)
    seconds["worker joined"] = time.monotonic() - started

    script = machines.checkout / "work.py"
    script.write_text(WORK)
    machines.ray("rsync-up", "here.yaml", str(script), str(Path.home() / "work.py"))
    out = timed("two tasks", "exec", "here.yaml", "~/viladiff-env/bin/python ~/work.py")
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=machines.checkout, capture_output=True, text=True)
    found = json.loads(re.search(r"FOUND (.*)", out).group(1))  # type: ignore[union-attr]
    assert found == [[WORKER, str(Path.home() / "viladiff/viladiff/record.py"), revision.stdout.strip()]] * 2

    # The dashboard is not for the network, and the head is for nobody without the token.
    reach = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"
    assert machines.run(sys.executable, "-c", reach, HEAD, "6379").returncode == 0
    assert machines.run(sys.executable, "-c", reach, HEAD, "8265").returncode == 1
    stranger = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    refused = machines.run("ray", "status", "--address", f"{HEAD}:6379", **stranger)
    assert refused.returncode != 0 and "CPU" not in refused.stdout

    assert sorted(machines.daemons()) == ["gcs_server", "raylet", "raylet"]
    timed("down", "down", "-y", "here.yaml")
    assert machines.daemons() in (["raylet"], [])
    started = time.monotonic()
    while machines.daemons():  # with listed machines, ray down stops the head; a worker goes when it has missed it
        assert time.monotonic() - started < 180
        time.sleep(1)
    seconds["worker gone"] = time.monotonic() - started
    print({name: round(value, 1) for name, value in seconds.items()})


def test_doctor_accepts_the_variant_for_this_machine(tmp_path: Path) -> None:
    """Machines by address: the same file with provider local, as an owner of machines would write it."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    tree = on_this_machine(yaml.safe_load((ROOT / "cluster.yaml").read_text()), tmp_path / "key")
    tree["file_mounts"] = {
        remote: local if local.startswith("~") else str(ROOT / local) for remote, local in tree["file_mounts"].items()
    }
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(tree))
    broken = [check for check in examine_cluster(tmp_path / "here.yaml") if check.broken]
    assert [check for check in broken if "auth_token" not in check.found] == []
