"""Proves sky_yamls/ against the real SkyPilot: offline, without an account, and without touching ~/.sky.

    make test-sky                                   # makes .venv-sky (SkyPilot needs an older click), then:
    .venv-sky/bin/python tests/sky/validate.py      # from the root of the repository

Every YAML is launched on paper with the very `--env`s of the `sky ... launch` command in its opening comment. SkyPilot
checks keys and values (as strictly as its server does), finds every candidate in a small catalog, and chooses one. What
SkyPilot accepts and a machine would trip over is checked here: undefined variables (also in the scripts that a YAML calls),
bucket names, ports, exit codes that recover, shell syntax, and that a wrong BUCKET is refused: by SkyPilot, before anything is
rented, or by the first lines of `setup` where the trainer does not know a store that SkyPilot does. At the end mistakes are
planted into each file, and every one has to be found. Exit code 1 when anything is wrong. The table of candidates and prices
is the README's.

The catalog holds the rows that our candidates need, with prices in USD an hour as SkyPilot's own catalog (v8) had them for
GPU nodes, and list prices for CPU machines; GCP bills a host and its GPUs in two rows, and one A100 as an eighth of eight.
Facts, undated: spot prices move.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CATALOG_VERSION = "v8"

# Not SKYPILOT_TASK_ID: it changes when a jobs controller restarts, so nothing may hang on it.
SKYPILOT_VARIABLES = {
    f"SKYPILOT_{name}"
    for name in ("NODE_IPS", "NODE_RANK", "NUM_NODES", "NUM_GPUS_PER_NODE", "MANAGED_JOB_ID", "CLUSTER_INFO", "USER")
}
SHELL_VARIABLES = {"HOME", "PATH", "USER", "HOSTNAME", "PWD", "TMPDIR"}

# What S3 and GCS both take.
STORES = ("s3", "gs", "hf")
BUCKET_NAME = re.compile(r"(?!\d+\.\d+\.\d+\.\d+$)(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")

# A BUCKET without its scheme would be a directory of a machine that is torn down.
WRONG_BUCKETS = ("my-chats", "s3:/bucket/x", "s3://", "s4://my-chats", "/my-chats", "", "az://my-chats")
RIGHT_BUCKETS = ("s3://my-chats", "gs://my-chats")
UNKNOWN_TO_THE_TRAINER = ("r2://my-chats", "https://account.blob.core.windows.net/my-chats")

# Of SkyPilot's own Ray (6380 and its dashboard), its server, and sshd.
TAKEN_PORTS = {22, 6380, 8265, 8266, 46580}

# Planted mistakes: the text of a file, what it becomes, and a word of the complaint. From "${BUCKET%/}/" on they are those that
# SkyPilot itself lets through.
MISTAKES = [
    ("\nresources:", "\nresource:", "resource"),
    ("use_spot:", "usespot:", "usespot"),
    ("max_restarts_on_errors:", "max_restart_on_errors:", "max_restart_on_errors"),
    ("strategy: EAGER_NEXT_REGION", "strategy: EAGER", "EAGER"),
    ("mode: MOUNT_CACHED", "mode: MOUNT_CACHE", "MOUNT_CACHE"),
    ('"A100-80GB:8"', '"A100-80GB:6"', "'A100-80GB': 6"),
    ('"H100:8"', '"H100:6"', "'H100': 6"),
    ("{infra: gcp", "{infra: gpc", "gpc"),
    ("BUCKET: null", "BUCKETS: null", "BUCKET"),
    ("workdir: .", "workdir: ./nowhere", "nowhere"),
    ("envs:\n", "envs:\n  ARGS: twice\n", "ARGS"),
    ("${BUCKET%/}/", "${BUKET%/}/", "BUKET"),
    ("BUCKET=s3://my-chats", "BUCKET=s3://My_chats", "My_chats"),
    ("BUCKET=s3://my-chats", "BUCKET=my-chats", "my-chats"),
    ("  s3://[!/]* |", "  * |", "BUCKET=r2://my-chats is not refused"),
    ("  s3://[!/]* |", "  *://[!/]* |", "BUCKET=r2://my-chats is not refused"),
    ("gs://[!/]* |", "", "BUCKET=gs://my-chats is refused"),
    ("source: ${BUCKET}", "source: s3://my-chats", "BUCKET=my-chats is not refused"),
    ("set -euo pipefail", 'set -euo pipefail; if [ -d "x" ]; then', "syntax"),
    ("$SKYPILOT_NUM_GPUS_PER_NODE", "$SKYPILOT_NUM_GPU_PER_NODE", "SKYPILOT_NUM_GPU_PER_NODE"),
    ("$RUN_NAME", "$SKYPILOT_TASK_ID", "SKYPILOT_TASK_ID"),
    ("recover_on_exit_codes: [75]", "recover_on_exit_codes: [75, 137]", "137"),
    ("recover_on_exit_codes: [75]", "recover_on_exit_codes: [57]", "75"),
    ("--master-port 29500", "--master-port 6380", "6380"),
    ("ray start --head --port 6390", "ray start --head --port 80", "80"),
    ("bash sky_yamls/setup.sh", "bash sky_yamls/set-up.sh", "set-up.sh"),
    ("workdir: .", "workdir: .\nservice: {readiness_probe: /health, replicas: 1}", "ports"),
    ("target_qps_per_replica:", "target_qps_per_replicas:", "target_qps_per_replicas"),
    ("min_replicas: 1", "min_replicas: 9", "max_replicas"),
    ("  ports: 8080\n", "", "ports"),
]


@dataclass
class Choice:
    """One candidate of a YAML and what it costs; `chosen` is where SkyPilot would go first."""

    file: str
    hardware: str
    place: str
    dollars: float
    chosen: bool


def main() -> int:
    with tempfile.TemporaryDirectory() as home, offline_skypilot(Path(home)):
        texts = {path.name: path.read_text() for path in sorted((ROOT / "sky_yamls").glob("*.*"))}
        yamls = [name for name in texts if name.endswith(".yaml")]
        problems = [] if yamls else ["sky_yamls/: no YAML found"]
        choices: list[Choice] = []
        for name in yamls:
            try:
                choices += check(name, texts)
            except ValueError as error:
                problems.append(f"{name}: {error}")
        if not problems:
            problems = plant_mistakes(texts)
    print_table(choices)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"{len(yamls)} files are fine; each of {len(MISTAKES)} kinds of planted mistakes was found")
    return 1 if problems else 0


@contextlib.contextmanager
def offline_skypilot(home: Path):
    """SkyPilot with our catalog, all our clouds enabled, strict schemas, an empty home and no way out to the network."""
    for name in [
        n for n in os.environ if n.startswith(("SKY", "AWS_", "GOOGLE_", "CLOUDSDK_")) or n.lower().endswith("_proxy")
    ]:
        del os.environ[name]
    os.environ |= {
        "HOME": str(home),
        "HTTP_PROXY": "http://127.0.0.1:9",  # nobody listens: a file missing from the catalog fails at once
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        "IS_SKYPILOT_SERVER": "true",  # the client passes unknown keys in job_recovery on for the server to refuse
    }
    # Files without an md5 beside them are taken as hand-made and never downloaded again.
    shutil.copytree(HERE / "catalog", home / ".sky" / "catalogs" / CATALOG_VERSION)
    os.chdir(ROOT)  # workdir and local mounts are relative to where `sky` is called

    with contextlib.redirect_stdout(io.StringIO()):  # a server's progress messages; its logger is made at the import
        import sky

        with (
            mock.patch("sky.server.plugins.plugins_loaded", return_value=True),
            mock.patch("sky.check.get_cached_enabled_clouds_or_refresh", return_value=[sky.AWS(), sky.GCP()]),
            mock.patch("sky.check.check_capability", return_value=None),
            mock.patch("sky.clouds.utils.gcp_utils.list_reservations_for_instance_type_in_zone", return_value=[]),
        ):
            yield


def check(name: str, texts: dict[str, str]) -> list[Choice]:
    """All checks of one YAML, SkyPilot's first; `texts` are all files by name. Returns its candidates; raises ValueError with
    what is wrong.
    """
    text = texts[name]
    envs = documented_envs(text)
    for value in envs.values():  # what the example would upload from the user's home has to exist
        if value.startswith("~/"):
            Path(value).expanduser().mkdir(parents=True, exist_ok=True)
    try:
        config, task = load(text, envs)
        task.validate()
        choices = price(name, task)
    except Exception as error:  # SkyPilot raises many kinds; each is a finding
        raise ValueError(f"SkyPilot refuses it: {plain(error)}") from None
    check_bucket(task.envs.get("BUCKET", ""))
    check_mounts(task)
    check_wrong_buckets(text, envs, texts)
    if "service" in config and not any(candidate.ports for candidate in task.resources):
        raise ValueError("resources: a service without ports")
    if "sky jobs launch" in text:
        check_recovery(task)
    for key in ("setup", "run"):
        check_script(key, with_scripts(config.get(key) or "", texts), {*task.envs, *task.secrets})
    return choices


def scripts_of(text: str) -> list[str]:
    """Names of the scripts in sky_yamls/ that a script or a whole YAML calls."""
    return re.findall(r"bash sky_yamls/([\w.-]+)", re.sub(r"(?m)^\s*#.*", "", text))


def with_scripts(script: str, texts: dict[str, str]) -> str:
    """The script with those of sky_yamls/ that it calls behind it: they see the same variables."""
    called = scripts_of(script)
    missing = [name for name in called if name not in texts]
    if missing:
        raise ValueError(f"sky_yamls/{missing[0]}: no such script")
    return "\n".join([script, *(texts[name] for name in called)])


def documented_envs(text: str) -> dict[str, str]:
    """The `--env NAME=VALUE`s of the launch command in the opening comment."""
    comment = re.match(r"(?:#.*\n)+", text)
    launch = r"sky (?:jobs launch|launch|serve up) (?:.*\\\n)*.*"
    command = re.search(launch, comment[0].replace("\n#", "\n")) if comment else None
    if command is None:
        raise ValueError("its opening comment shows no `sky launch`, `sky jobs launch` or `sky serve up`")
    words = shlex.split(command[0])
    return dict(value.split("=", 1) for flag, value in zip(words, words[1:]) if flag == "--env")


def load(text: str, envs: dict[str, str]):
    """The YAML as `sky launch --env ...` reads it: (plain dictionary, sky.Task)."""
    import sky
    from sky.utils import yaml_utils

    yaml_utils.check_no_duplicate_keys(text)
    unknown = envs.keys() - yaml_utils.safe_load(text).get("envs", {}).keys()
    if unknown:
        raise ValueError(f"the command in its comment sets {', '.join(sorted(unknown))}, which `envs` does not have")
    task = sky.Task.from_yaml_config(yaml_utils.safe_load(text), env_overrides=list(envs.items()))
    return yaml_utils.safe_load(text), task


def price(name: str, task) -> list[Choice]:
    """Every candidate at its cheapest place. One that no cloud offers is an error, even where another would be chosen."""
    best = optimize(task, task.resources)
    choices = []
    for candidate in task.resources:
        found = optimize(task, [candidate])
        gpus = " + ".join(f"{count:g}x {kind}" for kind, count in (found.accelerators or {}).items())
        kind = "spot" if found.use_spot else "on demand"
        choices.append(
            Choice(
                file=name,
                hardware=f"{task.num_nodes} x {found.instance_type}, {gpus or 'CPU'}, {kind}",
                place=f"{str(found.cloud).lower()}/{found.region}",
                dollars=found.get_cost(3600) * task.num_nodes,
                chosen=(str(found.cloud), found.region, found.instance_type)
                == (str(best.cloud), best.region, best.instance_type),
            )
        )
    return choices


def optimize(task, candidates):
    """SkyPilot's choice among `candidates`: sky.Resources with an instance type and a region."""
    import sky
    from sky.optimizer import Optimizer

    before = task.resources
    task.set_resources(type(before)(candidates))
    try:
        with sky.Dag() as dag:
            dag.add(task)
        Optimizer.optimize(dag, quiet=True)
        return task.best_resources
    except Exception as error:
        raise ValueError(f"{', '.join(map(str, candidates))}: {plain(error)}") from None
    finally:
        task.set_resources(before)
        task.best_resources = None


def check_bucket(url: str) -> None:
    """As the trainer takes it: the address of an existing bucket."""
    store, _, name = url.partition("://")
    if store not in STORES or not BUCKET_NAME.fullmatch(name.split("/")[0]):
        raise ValueError(f"BUCKET: {url!r} is no address of a bucket, such as s3://my-chats")


def check_wrong_buckets(text: str, envs: dict[str, str], texts: dict[str, str]) -> None:
    """A BUCKET that is no bucket is refused before anything is rented; a store of others before anything is installed."""
    for bucket in WRONG_BUCKETS:
        if not refused_by_skypilot(text, {**envs, "BUCKET": bucket})[1]:
            raise ValueError(f"BUCKET={bucket} is not refused before anything is rented")
    has_setup = "setup.sh" in scripts_of(text)
    for bucket in (*RIGHT_BUCKETS, *(UNKNOWN_TO_THE_TRAINER if has_setup else ())):
        task, refused = refused_by_skypilot(text, {**envs, "BUCKET": bucket})
        refused = refused or (refused_by_setup(task, texts) if has_setup else "")
        if bool(refused) == (bucket in RIGHT_BUCKETS):
            raise ValueError(f"BUCKET={bucket} is {'' if refused else 'not '}refused {refused}".rstrip())


def refused_by_skypilot(text: str, envs: dict[str, str]) -> tuple:
    """(task, why SkyPilot refuses to launch it, or ""): it looks at the sources of mounts before it rents anything.

    Here it has no credentials. With them it asks the storage, too, and refuses a bucket that does not exist.
    """
    from sky.data.storage import S3Store, Storage

    try:
        _, task = load(text, envs)
        for mount in task.storage_mounts.values():
            Storage._validate_source(mount.source, mount.mode, True)
            if urlsplit(mount.source).scheme != "https":
                S3Store.validate_name(urlsplit(mount.source).netloc)
    except Exception as error:  # SkyPilot raises many kinds
        return None, plain(error)
    return task, ""


def refused_by_setup(task, texts: dict[str, str]) -> str:
    """Why the machine's `setup` fails, or "": it is run with a uv that does nothing."""
    with tempfile.TemporaryDirectory() as home:
        machine = Path(home)
        for directory in (machine / ".local" / "bin", machine / "sky_yamls"):
            directory.mkdir(parents=True, exist_ok=True)
        for name, content in texts.items():
            (machine / "sky_yamls" / name).write_text(content)
        uv = machine / ".local" / "bin" / "uv"
        uv.write_text("#!/bin/sh\n")
        uv.chmod(0o755)
        environment = {**task.envs, "HOME": str(machine), "PATH": os.environ["PATH"]}
        done = subprocess.run(["bash", "-c", task.setup], cwd=machine, env=environment, capture_output=True, text=True)
        return done.stderr.strip() if done.returncode else ""


def check_mounts(task) -> None:
    """Bucket names, and variables in paths: there SkyPilot fills in envs and secrets and leaves all else as it stands."""
    for target, storage in task.storage_mounts.items():
        if storage.name and not BUCKET_NAME.fullmatch(storage.name):
            raise ValueError(f"file_mounts {target}: {storage.name!r} is no valid bucket name")
    paths = [*(task.file_mounts or {}).items(), *((t, s.source or "") for t, s in task.storage_mounts.items())]
    for path in (part for pair in paths for part in pair):
        if "$" in path:
            raise ValueError(f"file_mounts: {path!r} uses a variable that is in neither envs nor secrets")


def check_recovery(task) -> None:
    """A managed job recovers from the code of a stopped trainer, and not from 137: the other nodes' when any of them fails."""
    for candidate in task.resources:
        codes = (candidate.job_recovery or {}).get("recover_on_exit_codes")
        if codes != [75]:
            raise ValueError(f"job_recovery: recover_on_exit_codes is {codes}, not [75]")


def check_script(key: str, script: str, given: set[str]) -> None:
    """Syntax, and every variable defined: by the YAML, by SkyPilot, by the system, or by the script itself."""
    syntax = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if syntax.returncode:
        raise ValueError(f"{key}: {syntax.stderr.strip()}")
    code = re.sub(r"(?:^|(?<=\s))#.*", "", script)
    for port in map(int, re.findall(r"port[ =](\d+)", code)):
        if port in TAKEN_PORTS or not 1024 <= port <= 65535:
            raise ValueError(f"{key}: port {port} is not free on a machine of SkyPilot's")
    own = set(re.findall(r"\b([A-Za-z_]\w*)\+?=", code))
    own |= set(re.findall(r"\b(?:for|read|mapfile)\s+(?:-\w+\s+(?:''\s+)?)*([A-Za-z_]\w*)", code))
    used = set(re.findall(r"\$\{?[#!]?([A-Za-z_]\w*)", code))
    undefined = used - own - given - SKYPILOT_VARIABLES - SHELL_VARIABLES
    if undefined:
        raise ValueError(f"{key}: ${', $'.join(sorted(undefined))}: not in envs or secrets, and not set by the script")


def plant_mistakes(texts: dict[str, str]) -> list[str]:
    """Each of MISTAKES in every YAML that it fits. Returns those that were not found, or fit nowhere."""
    missed = []
    for right, wrong, word in MISTAKES:
        fitting = [name for name, text in texts.items() if right in text]
        if not fitting:
            missed.append(f"planted mistakes: {right!r} is in none of the files any more")
        for name in fitting:
            changed = {**texts, name: texts[name].replace(right, wrong, 1)}
            for yaml in [n for n in texts if n.endswith(".yaml") and name in (n, *scripts_of(texts[n]))]:
                try:
                    check(yaml, changed)
                    missed.append(f"{yaml}: {wrong!r} for {right!r} in {name} was not noticed")
                except ValueError as error:
                    if word not in str(error):
                        missed.append(f"{yaml}: {wrong!r} for {right!r} was refused for another reason: {error}")
    return missed


def plain(error: BaseException) -> str:
    """One line without terminal colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split()) or type(error).__name__


def print_table(choices: list[Choice]) -> None:
    """For people and for the README; files with the same candidates share rows, and the arrow is SkyPilot's first choice."""
    lines: dict[str, list[tuple[str, ...]]] = {}
    for c in choices:
        line = (c.hardware, c.place, f"{c.dollars:.2f}", "<- chosen" if c.chosen else "")
        lines.setdefault(c.file.removesuffix(".yaml"), []).append(line)
    groups: dict[tuple, list[str]] = {}
    for file, candidates in lines.items():
        groups.setdefault(tuple(candidates), []).append(file)
    rows = [("file", "candidate", "cheapest in", "$/hour", "")]
    rows += [(", ".join(files), *line) for candidates, files in groups.items() for line in candidates]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for file, hardware, place, dollars, mark in rows:
        line = f"{file:{widths[0]}}  {hardware:{widths[1]}}  {place:{widths[2]}}  {dollars:>{widths[3]}}  {mark}"
        print(line.rstrip())


if __name__ == "__main__":
    sys.exit(main())
