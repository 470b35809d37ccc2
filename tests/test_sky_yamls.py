"""sky_yamls/ without SkyPilot: each `run` section is run by bash, with a recorder in torchrun's place, and its command line is
read by the trainer's own parser. (`make test-sky` has SkyPilot itself look at them: tests/sky/validate.py.)
"""

import os
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from fastft.config import parse_config

ROOT = Path(__file__).parent.parent
FILES = sorted(path.name for path in (ROOT / "sky_yamls").glob("*.yaml"))
TRAINING = [name for name in FILES if "bash sky_yamls/train.sh" in (ROOT / "sky_yamls" / name).read_text()]

RECORDER = """#!/usr/bin/env bash
printf '%s\\0' "$@" >"$HOME/argv"
if [ -n "$MARK" ]; then mkdir -p "$(dirname "$MARK")"; touch "$MARK"; fi
exit "$ENDS_WITH"
"""


def documented(name: str) -> dict[str, str]:
    """The --env of the launch command in the opening comment."""
    comment = re.match(r"(?:#.*\n)+", (ROOT / "sky_yamls" / name).read_text())[0].replace("\\\n#", " ")
    words = shlex.split(re.search(r"sky (?:jobs )?launch .*", comment)[0])
    return dict(value.split("=", 1) for flag, value in zip(words, words[1:]) if flag == "--env")


def run(tmp_path: Path, name: str, gpus: int, mib: int | None, ends_with: int = 0, mark: bool = False, **envs: str):
    """(exit code, arguments of the trainer, those of torchrun) of the YAML's `run` on machines with such GPUs."""
    config = yaml.safe_load((ROOT / "sky_yamls" / name).read_text())
    envs = {**config["envs"], **documented(name), **envs}
    tools = tmp_path / "venv" / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    (tools / "activate").write_text(f'PATH="{tools}:$PATH"\n')
    programs = {"torchrun": RECORDER}
    if mib:
        programs["nvidia-smi"] = f"#!/bin/sh\necho {mib}\n"
    for program, text in programs.items():
        (tools / program).write_text(text)
        (tools / program).chmod(0o755)
    nodes = config.get("num_nodes", 1)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "SKYPILOT_NODE_IPS": "\n".join(f"10.0.0.{i}" for i in range(1, nodes + 1)),
        "SKYPILOT_NODE_RANK": str(nodes - 1),
        "SKYPILOT_NUM_NODES": str(nodes),
        "SKYPILOT_NUM_GPUS_PER_NODE": str(gpus),
        "ENDS_WITH": str(ends_with),
        "MARK": str(tmp_path / "runs" / (envs["RUN_NAME"] or Path(envs["MODEL"]).name) / "preempted") if mark else "",
    }
    done = subprocess.run(["bash", "-c", config["run"]], cwd=ROOT, env={**environment, **envs}, capture_output=True)
    argv = (tmp_path / "argv").read_bytes().decode().split("\0")[:-1]
    split = argv.index("fastft.train")
    return done.returncode, argv[split + 1 :], argv[: split + 1]


def gpus_of(name: str) -> list[int]:
    config = yaml.safe_load((ROOT / "sky_yamls" / name).read_text())
    return sorted({int(candidate["accelerators"].split(":")[1]) for candidate in config["resources"]["ordered"]})


@pytest.mark.parametrize("name", TRAINING)
def test_the_trainer_takes_every_flag(tmp_path, name):
    """On every candidate's number of GPUs, with little and much memory: the same global batch, divided without a rest."""
    for gpus in gpus_of(name):
        for mib in (None, 23_028, 40_960, 81_559, 143_771):
            code, argv, launcher = run(tmp_path, name, gpus, mib, ARGS="--seed 3")
            config = parse_config(argv)
            nodes = int(launcher[launcher.index("--nnodes") + 1])
            assert code == 0 and config.seed == 3
            assert config.global_batch_size == int(
                yaml.safe_load((ROOT / "sky_yamls" / name).read_text())["envs"]["GLOBAL_BATCH"]
            )
            assert config.global_batch_size % (nodes * gpus * config.micro_batch_size) == 0
            assert config.micro_batch_size == 1 or mib / config.micro_batch_size >= 20_000
            assert nodes * gpus % config.replicas == 0 and launcher[launcher.index("--master-addr") + 1] == "10.0.0.1"
            assert config.checkpoint.remote == f"s3://my-chats/{Path(config.output_dir).name}"


def test_a_run_without_a_name_has_the_models(tmp_path):
    for name, said in (("", "Qwen2.5-7B"), ("v2", "v2")):
        config = parse_config(run(tmp_path, "train.yaml", 8, 81_559, RUN_NAME=name)[1])
        assert config.checkpoint.remote == f"s3://my-chats/{said}" and Path(config.output_dir).name == said


def test_a_machine_takes_as_many_rows_as_its_memory_holds(tmp_path):
    """80 GB take four rows of 32, and three where 72 are to be divided by 8 GPUs."""
    assert parse_config(run(tmp_path, "train.yaml", 8, 81_559)[1]).micro_batch_size == 4
    assert parse_config(run(tmp_path, "vicuna-7b.yaml", 8, 81_559)[1]).micro_batch_size == 3
    assert parse_config(run(tmp_path, "train.yaml", 8, 40_960)[1]).micro_batch_size == 2


@pytest.mark.parametrize("name", ["vicuna-7b.yaml", "vicuna-13b.yaml"])
def test_vicunas_files_hold_the_published_recipe(tmp_path, name):
    config = parse_config(run(tmp_path, name, 8, 81_559)[1])
    assert (config.seq_len, config.epochs, config.template, config.global_batch_size) == (2048, 3, "vicuna", 72)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (2e-5, 0.0)
    assert (config.schedule.name, config.schedule.warmup_ratio) == ("cosine", 0.03)


@pytest.mark.parametrize(
    ("ends_with", "mark", "said"),
    [(0, False, 0), (0, True, 0), (1, False, 1), (1, True, 75), (143, True, 75), (2, False, 2)],
)
def test_a_stopped_trainer_is_told_from_a_failed_one(tmp_path, ends_with, mark, said):
    """torchrun ends with 1 for both; the trainer's mark makes the difference. A finished run is one."""
    assert run(tmp_path, "train.yaml", 8, 81_559, ends_with, mark)[0] == said


def test_a_signal_does_not_hide_how_it_ended(tmp_path):
    """SIGTERM for the script alone: it waits for torchrun, and still says 75."""
    config = yaml.safe_load((ROOT / "sky_yamls" / "train.yaml").read_text())
    assert (
        "trap : TERM INT" in (ROOT / "sky_yamls" / "train.sh").read_text()
        and config["run"] == "bash sky_yamls/train.sh"
    )
    sleeper = RECORDER.replace("printf", "sleep 1; printf")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text(f'PATH="{tmp_path}:$PATH"\n')
    (tmp_path / "torchrun").write_text(sleeper)
    (tmp_path / "torchrun").chmod(0o755)
    names = ("NODE_IPS", "NODE_RANK", "NUM_NODES", "NUM_GPUS_PER_NODE")
    envs = {
        "MODEL": "m",
        "DATA": "d",
        "BUCKET": "b",
        "RUN_NAME": "r",
        "GLOBAL_BATCH": "8",
        "ARGS": "",
        "ENDS_WITH": "1",
    }
    envs |= {f"SKYPILOT_{name}": "1" for name in names} | {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    envs["MARK"] = str(tmp_path / "runs" / "r" / "preempted")
    with subprocess.Popen(["bash", "sky_yamls/train.sh"], cwd=ROOT, env=envs) as script:
        with pytest.raises(subprocess.TimeoutExpired):
            script.wait(timeout=0.5)
        script.terminate()
        assert script.wait(timeout=30) == 75


@pytest.mark.parametrize(
    ("bucket", "right"),
    [("s3://my-chats", True), ("hf://buckets/o/n", True), ("file:///mnt/b", True), ("az://c", True)]
    + [(wrong, False) for wrong in ("my-chats", "s3:/b/x", "s3://", "s3:///x", "s4://b", "/my-chats", "file://b", "")],
)
def test_the_set_up_refuses_a_bucket_that_is_no_address_before_it_installs_anything(tmp_path, bucket, right):
    """It would be a directory of the machine, which is torn down with the only model."""
    uv = tmp_path / ".local/bin/uv"
    uv.parent.mkdir(parents=True)
    uv.write_text('#!/bin/sh\necho "$@" >>"$HOME/installed"\n')
    uv.chmod(0o755)
    envs = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "BUCKET": bucket}
    command = ["bash", "sky_yamls/setup.sh"]
    done = subprocess.run(command, cwd=ROOT, env=envs, capture_output=True, text=True)
    assert (done.returncode == 0) == (tmp_path / "installed").exists() == right
    if not right:
        assert done.stderr == (
            f"error: BUCKET: '{bucket}' is no address of storage, such as s3://my-chats, gs://, az:// or hf://buckets/\n"
        )


def test_the_cleaner_takes_its_flags():
    from cleaning.__main__ import CleanConfig, FilterConfig, options
    from cleaning.settings import RunSettings

    arguments = shlex.split(documented("clean.yaml")["ARGS"])
    _, run_settings, _ = options(["dump.json", "-o", "out", *arguments])
    assert run_settings.max_tokens == 2048
    flags = set(re.findall(r"(?<!\S)(--[a-z_]+)", (ROOT / "sky_yamls" / "clean.yaml").read_text().split("\nrun:")[1]))
    names = {
        field.metadata.get("name") or f"--{field.name}"
        for cls in (CleanConfig, RunSettings, FilterConfig)
        for field in fields(cls)
    }
    assert flags - {"--address", "--block", "--head", "--port"} <= names
