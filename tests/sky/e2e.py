"""A real managed job of the real SkyPilot, preempted twice, on one Linux machine: no cloud, no container, no Ray.

    make sky-e2e                # as root, Debian or Ubuntu; makes .venv-sky-e2e, then: .venv-sky-e2e/bin/python tests/sky/e2e.py

SkyPilot's Slurm cloud needs no more than sshd and Slurm, so two nodes of a Slurm cluster run on loopback, in a chroot over an
overlay of / with mount, process and host name namespaces of its own: packages, users and daemons exist in there only, and are
gone when this ends. The job is sky_yamls/train.yaml with a tiny model on CPU; what differs is in `task` below. It is preempted by
`scancel` and by taking its node down. Shown at the end: SUCCEEDED, resumed at the newest checkpoint in the bucket, with up to
EVERY steps done again and none skipped (at SIGTERM SkyPilot's script removes the node's directory, often before the save of that
moment is uploaded), weights and losses those of an uninterrupted run, bit for bit. Exit code 1 when anything of that is not so.
"""

import ctypes
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "slurm-wlm munge openssh-server rsync socat netcat-openbsd sudo"
HOST = "box"
INSIDE = "FASTFT_E2E_GROUND"  # in the process that runs in the namespaces of its own: the directory for everything
STEPS, EVERY = 400, 20
TRAINING = (
    f"--max_steps {STEPS} --epochs 100 --seq_len 256 --checkpoint.every {EVERY} --optimizer.lr 1e-3 --log_every 1"
)
GLOBAL_BATCH = 4

SLURM_CONF = f"""
ClusterName=local
SlurmctldHost={HOST}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# with pgid, steps cannot be killed for a minute, and the node is drained
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
StateSaveLocation=/var/spool/slurmctld
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd-%n.pid
SlurmdSpoolDir=/var/spool/slurmd-%n
MpiDefault=none
UnkillableStepTimeout=10
NodeName=n1 NodeHostname={HOST} NodeAddr=127.0.0.1 Port=27001 CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={HOST} NodeAddr=127.0.0.1 Port=27002 CPUs=2 RealMemory=4000
PartitionName=dev Nodes=n1,n2 Default=YES State=UP
"""
SSHD_CONF = """
Port 2222
ListenAddress 127.0.0.1
PasswordAuthentication no
UsePAM yes
AcceptEnv *
Subsystem sftp /usr/lib/openssh/sftp-server
"""
SKY_CONF = """
allowed_clouds: [slurm]
jobs: {controller: {consolidation_mode: true}}
"""
# The runtime's set-up pipes uv's installer from the web into sh, and has uv fetch a Python 3.10: here the web is this machine.
CURL = """#!/bin/sh
case "$*" in
*astral.sh/uv*) echo 'mkdir -p "$UV_INSTALL_DIR" && cp /usr/local/bin/node-uv "$UV_INSTALL_DIR/uv"' ;;
*) exec /usr/bin/curl "$@" ;;
esac
"""
UV = """#!/bin/bash
export UV_CACHE_DIR=/var/cache/node-uv UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1
exec {uv} "${{@/#3.10/{python}}}"
"""


def main() -> int:
    if sys.argv[1:]:  # there are no options, and this environment, SkyPilot's, has no parser of ours
        print(__doc__)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    if INSIDE in os.environ:
        return inside(Path(os.environ[INSIDE]))
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("apt-get"):
        print("error: sky-e2e needs root on a Linux with apt (Debian, Ubuntu)", file=sys.stderr)
        return 1
    ground = Path(tempfile.mkdtemp(prefix="fastft-e2e-"))
    ground.chmod(0o755)
    # When this process ends, however it does, the kernel ends every process in there and takes the mounts away.
    command = ["unshare", "-m", "-p", "-u", "-f", "--kill-child", sys.executable, __file__]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return subprocess.run(command, env=os.environ | {INSIDE: str(ground)}).returncode
    finally:
        shutil.rmtree(ground, ignore_errors=True)


def inside(ground: Path) -> int:
    enter(ground)
    say("packages, in the overlay")
    install()
    prepare(ground)
    say("Slurm: two nodes on loopback; sshd; SkyPilot")
    start_cluster()
    start_sky(ground)
    began = time.monotonic()
    sky("jobs", "launch", "--yes", "--detach-run", "--name", "e2e", str(ground / "task.yaml"))
    wait_for(lambda: last_step(ground) >= EVERY, "the first steps", 600)
    say(f"step {last_step(ground)} after {time.monotonic() - began:.0f} s; {queue()}")
    lost = [preempt(ground, "scancel", lambda job, node: ["scancel", job])]
    wait_for(lambda: last_step(ground) >= 2 * STEPS // 3, "more steps", 600)
    down = lambda job, node: ["scontrol", "update", f"nodename={node}", "state=down", "reason=preempted"]  # noqa: E731
    lost.append(preempt(ground, "node down", down))
    wait_for(lambda: "SUCCEEDED" in queue() or "FAILED" in queue(), "the end", 900)
    say(queue())
    say("an uninterrupted run, for comparison")
    train_here(ground, ground / "reference")
    return judge(ground, lost)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def run(*command: str, quiet: bool = True, **options: Any) -> str:
    """Runs it; with its output, exits with it where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode:
        print(done.stdout[-4000:])
        raise SystemExit(f"error: {' '.join(command)}: exit code {done.returncode}")
    if not quiet:
        print(done.stdout, end="", flush=True)
    return done.stdout


def wait_for(condition: Callable[[], Any], what: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or failed():
            print(queue())
            for log in Path("/home/driver/sky_logs/jobs_controller").glob("[0-9]*.log"):
                print(log.read_text(errors="replace")[-6000:])
            raise SystemExit(f"error: waited {seconds:.0f} s for {what}")
        time.sleep(0.25)


# The machine in the machine ------------------------------------------------------------------------------------------------


def enter(ground: Path) -> None:
    for name in ("upper", "work", "root"):
        (ground / name).mkdir()
    root = ground / "root"
    layers = f"lowerdir=/,upperdir={ground}/upper,workdir={ground}/work"
    run("mount", "-t", "overlay", "overlay", "-o", layers, str(root))
    for name in ("dev", "sys"):
        run("mount", "--rbind", f"/{name}", f"{root}/{name}")
    run("mount", "-t", "proc", "proc", f"{root}/proc")
    run("mount", "-t", "tmpfs", "tmpfs", f"{root}/run")
    for path in (ROOT, ground):  # / is one file system of perhaps several
        Path(f"{root}{path}").mkdir(parents=True, exist_ok=True)
        run("mount", "--bind", str(path), f"{root}{path}")
    os.chroot(root)
    os.chdir("/")
    assert ctypes.CDLL(None, use_errno=True).sethostname(HOST.encode(), len(HOST)) == 0
    with open("/etc/hosts", "a") as hosts:
        hosts.write(f"127.0.0.1 {HOST} n1 n2\n")
    Path("/home/driver").mkdir()
    os.environ |= {"HOME": "/home/driver", "USER": "root", "DEBIAN_FRONTEND": "noninteractive"}


def install() -> None:
    run("apt-get", "update", "--quiet")
    run("apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *PACKAGES.split())


def prepare(ground: Path) -> None:
    """A tiny model, conversations, and the task: train.yaml on a node of this cluster, with a directory as its bucket."""
    import yaml

    code = (
        "import sys; from pathlib import Path; import models; ground = Path(sys.argv[1]);"
        "models.make_model(ground / 'model', hidden_size=128, intermediate_size=256, num_hidden_layers=4);"
        "models.make_data(ground / 'conversations.jsonl', conversations=400)"
    )
    run(f"{ROOT}/.venv/bin/python", "-c", code, str(ground), cwd=ROOT / "tests")
    run("chmod", "-R", "a+rX", str(ground / "model"))  # safetensors writes for its user only
    (ground / "bucket").mkdir()
    (ground / "bucket").chmod(0o777)
    task = yaml.safe_load((ROOT / "sky_yamls/train.yaml").read_text())
    task["resources"] = {"infra": "slurm/local", "cpus": 1, "job_recovery": task["resources"]["job_recovery"]}
    task["setup"] = f"ln -sfn {ROOT}/.venv ~/venv"  # no package index is asked
    task["run"] = "echo attempt $(date +%s%N)\n" + task["run"]
    task["workdir"] = str(ROOT)
    task["file_mounts"] = {"~/data/conversations.jsonl": str(ground / "conversations.jsonl")}
    task["envs"] |= {
        "MODEL": str(ground / "model"),
        "DATA": str(ground / "conversations.jsonl"),
        "BUCKET": f"file://{ground}/bucket",
        "RUN_NAME": "e2e",
        "GLOBAL_BATCH": str(GLOBAL_BATCH),
        "ARGS": TRAINING,
        "OMP_NUM_THREADS": "1",
    }
    (ground / "task.yaml").write_text(yaml.safe_dump(task, sort_keys=False))


def train_here(ground: Path, output: Path) -> None:
    command = [
        f"{ROOT}/.venv/bin/torchrun",
        "--nproc-per-node",
        "1",
        "-m",
        "fastft.train",
        "--model",
        f"{ground}/model",
    ]
    command += ["--data", f"{ground}/conversations.jsonl", "--output_dir", str(output), *TRAINING.split()]
    command += ["--global_batch_size", str(GLOBAL_BATCH), "--micro_batch_size", "1"]
    run(*command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def start_cluster() -> None:
    Path("/etc/slurm").mkdir(exist_ok=True)
    Path("/etc/slurm/slurm.conf").write_text(SLURM_CONF)
    Path("/etc/slurm/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    run("useradd", "--create-home", "--shell", "/bin/bash", "sky")
    Path("/etc/sudoers.d/sky").write_text("sky ALL=(ALL) NOPASSWD: ALL\n")
    for path in [Path(sys.executable).resolve(), *Path(f"{ROOT}/.venv/bin/python").resolve().parents]:
        if path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)  # sky walks to the interpreters, wherever they lie
    for path in ("/run/sshd", "/run/munge", "/var/spool/slurmctld", "/var/spool/slurmd-n1", "/var/spool/slurmd-n2"):
        Path(path).mkdir(parents=True, exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    run("sudo", "-u", "munge", "munged", "--force")
    Path("/etc/ssh/sshd_config").write_text(SSHD_CONF)
    run("ssh-keygen", "-A")
    run("/usr/sbin/sshd")
    run("slurmctld")
    for node in ("n1", "n2"):
        run("slurmd", "-N", node)
    nodes = lambda: subprocess.run(["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True).stdout  # noqa: E731
    wait_for(lambda: nodes().strip() == "idle", "idle nodes", 60)


def start_sky(ground: Path) -> None:
    home, key = Path(os.environ["HOME"]), Path("/home/driver/.ssh/id_ed25519")
    for path in (home / ".ssh", home / ".slurm", home / ".sky", Path("/home/sky/.ssh")):
        path.mkdir(parents=True, exist_ok=True)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    shutil.copy(f"{key}.pub", "/home/sky/.ssh/authorized_keys")
    run("chown", "-R", "sky:sky", "/home/sky/.ssh")
    lines = ("Host local", "HostName 127.0.0.1", "Port 2222", "User sky", f"IdentityFile {key}")
    (home / ".slurm/config").write_text("\n    ".join(lines) + "\n")
    (home / ".sky/config.yaml").write_text(SKY_CONF)
    uv = UV.format(uv=Path(sys.executable).with_name("uv"), python=sys.executable)
    for name, content in (("curl", CURL), ("node-uv", uv)):
        Path("/usr/local/bin", name).write_text(content)
        Path("/usr/local/bin", name).chmod(0o755)
    for path in (Path("/var/cache/node-uv"), Path("/var/cache/bytecode")):  # what a kept disk or image keeps
        path.mkdir()
        path.chmod(0o777)
    Path("/etc/environment").write_text("PYTHONPYCACHEPREFIX=/var/cache/bytecode\n")
    # Before it believes that a job is gone, the controller asks two addresses on the Internet whether there is a network.
    (package,) = importlib.util.find_spec("sky").submodule_search_locations
    source = Path(package, "backends/backend_utils.py")
    source.write_text(source.read_text().replace("'https://8.8.8.8', 'https://1.1.1.1'", "'http://127.0.0.1:46580'"))
    sky("check", "slurm")


def sky(*arguments: str) -> str:
    return run(str(Path(sys.executable).with_name("sky")), *arguments, cwd=os.environ["HOME"])


# What is watched -----------------------------------------------------------------------------------------------------------


def queue() -> str:
    """The job's line."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", sky("jobs", "queue")).splitlines()
    return next((" ".join(line.split()) for line in lines if " e2e " in line), "no job")


def failed() -> bool:
    logs = Path("/home/driver/sky_logs/jobs_controller").glob("[0-9]*.log")
    return any("user program failure" in log.read_text(errors="replace") for log in logs)


def metrics(ground: Path) -> list[dict]:
    """The steps in the home of the newest cluster."""
    files = sorted(
        Path("/home/sky").glob(".sky_clusters/*/runs/e2e/metrics.jsonl"), key=lambda path: path.stat().st_mtime
    )
    rows = []
    for line in files[-1].read_text().splitlines() if files else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # being written
    return [row for row in rows if "loss" in row]


def last_step(ground: Path) -> int:
    rows = metrics(ground)
    return rows[-1]["step"] if rows else 0


def preempt(ground: Path, how: str, command: Callable[[str, str], list[str]]) -> dict[str, Any]:
    """Take the job's node away; back when the job has done a step again."""
    job, node = run("squeue", "--noheader", "--states=RUNNING", "--format=%i %N").split()
    reached, began = last_step(ground), time.monotonic()
    run(*command(job, node))
    say(f"preempted ({how}): job {job} on {node}, at step {reached}")
    old = attempt()

    def gone_and_back() -> bool:
        nonlocal reached
        if attempt() in (old, None):
            reached = max(reached, last_step(ground))
            return False
        return resumed_at() is not None and last_step(ground) > resumed_at()

    wait_for(gone_and_back, "the first resumed step", 600)
    step = resumed_at()
    seconds = time.monotonic() - began
    say(f"goes on at step {step + 1}, {seconds:.0f} s after; {reached} had been reached; {queue()}")
    return {"how": how, "reached": reached, "resumed": step, "seconds": seconds}


def output() -> str:
    """What the job has printed on the cluster that is there now."""
    logs = sorted(
        Path("/home/sky").glob(".sky_clusters/*/sky_logs/*/tasks/run.log"), key=lambda path: path.stat().st_mtime
    )
    return logs[-1].read_text(errors="replace") if logs else ""


def attempt() -> str | None:
    found = re.search(r"attempt (\d+)", output())
    return found and found[1]


def resumed_at() -> int | None:
    found = re.search(r"resumed: step (\d+)", output())
    return int(found[1]) if found else None


def losses(path: Path) -> dict[int, float]:
    """By step; of a step done twice, the one that counted: the last."""
    return {row["step"]: row["loss"] for row in map(json.loads, path.read_text().splitlines()) if "loss" in row}


def judge(ground: Path, preemptions: list[dict[str, Any]]) -> int:
    """The model in the bucket and the losses of all steps against the uninterrupted run's."""
    print(
        f"{'preempted by':14} {'at step':>8} {'goes on after':>14} {'steps lost':>11} {'until the first new step':>25}"
    )
    for p in preemptions:
        lost, seconds = p["reached"] - p["resumed"], f"{p['seconds']:.0f} s"
        print(f"{p['how']:14} {p['reached']:8} {p['resumed']:14} {lost:11} {seconds:>25}")
    bucket, reference = ground / "bucket/e2e", ground / "reference"
    (last,) = bucket.glob(f"step-{STEPS:08}-*")  # metrics travel with the checkpoints
    name = "model/model.safetensors"
    checks = {
        "the job SUCCEEDED": "SUCCEEDED" in queue(),
        f"at most {EVERY} steps done again after each, none skipped": all(
            0 <= p["reached"] - p["resumed"] <= EVERY for p in preemptions
        ),
        f"losses of all {STEPS} steps equal the uninterrupted run's": losses(last / "metrics.jsonl")
        == losses(reference / "metrics.jsonl"),
        "weights bit-identical to the uninterrupted run's": (bucket / name).is_file()
        and (bucket / name).read_bytes() == (reference / name).read_bytes(),
    }
    for what, true in checks.items():
        say(f"{'yes' if true else 'NO'}: {what}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
