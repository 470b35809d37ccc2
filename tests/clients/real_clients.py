"""Real clients before a real `fastft serve`: `make test-clients`. Each runs in an environment of its own (environments.py).

Every client gets a plain answer, a stream, an error for a model that does not exist and for a prompt that is too long, and is
made to leave in mid-stream. What it shows must be what the gateway's record says that it was sent; when it has left, the worker
must have stopped within 2 seconds.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import environments
from helpers import gateways, models
from helpers.serving import ANSWERS, WorkerProcess, teach, wait_until

PROGRAMS = Path(__file__).parent / "programs"
WINDOW = 65536
"""Tokens, here bytes: aider's own instructions are 12,000."""
UNKNOWN = "the model 'nobody' does not exist; served: m, endless"
TOO_LONG = f"the model's context is {WINDOW} tokens, and the request needs"
STOPS_WITHIN_S = 2.0


@dataclass
class Ask:
    """What a client is to do."""

    url: str
    model: str
    question: str
    how: str
    """plain, stream, or leave."""
    home: Path
    """An empty directory."""


@dataclass
class Client:
    name: str
    command: Callable[[Ask], list[str]]
    hows: tuple[str, ...] = ("plain", "stream", "leave")
    reports: bool = False
    """Whether it is a program of ours that prints a line of JSON, and leaves without ending; others are told by Ctrl-C."""
    shown: Callable[[str], str] = str
    """The answer in what it has printed."""
    environment: dict[str, str] = field(default_factory=dict)


# The clients ---------------------------------------------------------------------------------------------------------------


def by_program(name: str, program: str) -> Client:
    def command(ask: Ask) -> list[str]:
        python = environments.program(name, "python")
        return [python, str(PROGRAMS / program), ask.url, ask.model, ask.question, ask.how]

    return Client(name, command, reports=True)


def openai_node(ask: Ask) -> list[str]:
    modules = environments.node_modules("openai-node")
    program = [str(PROGRAMS / "openai_node.mjs"), ask.url, ask.model, ask.question, ask.how]
    return ["env", f"NODE_MODULES={modules}", "node", *program]


def curl(ask: Ask) -> list[str]:
    content = {
        "model": ask.model,
        "messages": [{"role": "user", "content": ask.question}],
        "stream": ask.how != "plain",
    }
    (ask.home / "body.json").write_text(json.dumps({**content, "temperature": 0}))
    body = ["-H", "Content-Type: application/json", "-d", f"@{ask.home / 'body.json'}"]
    return ["curl", "-sSN", f"{ask.url}/chat/completions", *body]


def shown_by_curl(output: str) -> str:
    if not output.startswith("data: "):
        return json.loads(output)["choices"][0]["message"]["content"]
    assert output.endswith("data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in output.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])


def llm(ask: Ask) -> list[str]:
    entry = f"- model_id: {ask.model}\n  model_name: {ask.model}\n  api_base: {ask.url}\n"
    (ask.home / "extra-openai-models.yaml").write_text(entry)
    flags = ["--no-log", "-o", "temperature", "0", *(["--no-stream"] if ask.how == "plain" else [])]
    program = environments.program("llm", "llm")
    return ["env", f"LLM_USER_PATH={ask.home}", program, "-m", ask.model, *flags, ask.question]


def aider(ask: Ask) -> list[str]:
    flags = [
        "--no-git",
        "--yes-always",
        "--no-pretty",
        "--no-check-update",
        "--no-show-model-warnings",
        "--analytics-disable",
    ]
    flags += ["--no-auto-lint", "--no-suggest-shell-commands", "--no-show-release-notes"]
    flags += ["--no-stream"] if ask.how == "plain" else ["--stream"]
    program = environments.program("aider", "aider")
    return [program, *flags, "--openai-api-base", ask.url, "--model", f"openai/{ask.model}", "--message", ask.question]


def continue_cli(ask: Ask) -> list[str]:
    program = environments.node_modules("continue") / ".bin" / "cn"
    model = f"  - {{name: {ask.model}, provider: openai, model: {ask.model}, apiBase: '{ask.url}', apiKey: none}}\n"
    config = ask.home / "config.yaml"
    config.write_text("name: mine\nversion: 0.0.1\nschema: v1\nmodels:\n" + model)
    return [str(program), "--print", "--config", str(config), ask.question]


def lm_eval(ask: Ask) -> list[str]:
    """A task of one question, whose answer is that of "count"."""
    task = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(ask.home / "test.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 100_000 if ask.how == "leave" else 100, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    }
    (ask.home / "test.jsonl").write_text(json.dumps({"question": ask.question, "answer": ANSWERS["count"]}) + "\n")
    (ask.home / "ours.yaml").write_text(json.dumps(task))
    where = (
        f"model={ask.model},base_url={ask.url}/chat/completions,num_concurrent=1,max_retries=1,tokenized_requests=False"
    )
    flags = [
        "--tasks",
        str(ask.home / "ours.yaml"),
        "--apply_chat_template",
        "--log_samples",
        "--output_path",
        str(ask.home),
    ]
    program = environments.program("lm-eval", "lm_eval")
    return [program, "run", "--model", "local-chat-completions", "--model_args", where, *flags]


CLIENTS = [
    by_program("openai-2", "openai_python.py"),
    by_program("openai-3", "openai_python.py"),
    Client("openai-node", openai_node, reports=True),
    by_program("langchain", "langchain_openai_chat.py"),
    by_program("pydantic-ai", "pydantic_ai_agent.py"),
    Client("curl", curl, shown=shown_by_curl),
    Client("llm", llm),
    Client("aider", aider, environment={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": "none"}),
    Client("continue", continue_cli, ("stream", "leave")),
    Client("lm-eval", lm_eval, ("plain", "leave"), environment={"OPENAI_API_KEY": "none"}),
]


# The server ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`fastft serve` with a model that knows ANSWERS, and one that never ends."""
    place = tmp_path_factory.mktemp("clients")
    taught = teach(place / "taught", max_position_embeddings=WINDOW)
    endless = models.make_endless_model(place / "endless", max_position_embeddings=1 << 18)
    record = place / "record"
    flags = ["--model", f"m={taught}", "--model", f"endless={endless}", "--repeatable", "--record", str(record)]
    with gateways.gateway(*flags) as process:
        process.record = record
        id = process.chat("hello", model="endless", max_tokens=3).headers["x-fastft-event"]
        url = gateways.event_of(record, id)["tries"][0]["worker"]
        process.endless = WorkerProcess(url, "endless", process.process)
        yield process


@dataclass
class Seen:
    code: int
    output: str
    """Both streams."""
    text: str
    """On stdout."""
    events: list[dict]
    """What the gateway recorded meanwhile."""


def start(client: Client, ask: Ask) -> subprocess.Popen:
    command = client.command(ask)
    env = {"PATH": os.environ["PATH"], "HOME": str(ask.home), "LANG": "C.UTF-8", "TERM": "dumb", **client.environment}
    pipe, stdin = subprocess.PIPE, subprocess.PIPE if client.reports else subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ask.home, env=env, stdin=stdin, stdout=pipe, stderr=pipe, text=True)


def do(client: Client, served, tmp_path: Path, how: str, model: str = "m", question: str = "count") -> Seen:
    if how not in client.hows:
        how = client.hows[0]
    before = len(gateways.events(served.record))
    ask = Ask(served.url, model, question, how, tmp_path)
    process = start(client, ask)
    out, errors = process.communicate(timeout=300)
    wait_until(lambda: served.health()["in_flight"] == 0, "all requests have ended")
    time.sleep(0.3)  # longer than events gather before they are written
    return Seen(process.returncode, out + errors, out, gateways.events(served.record)[before:])


def require_truth(client: Client, seen: Seen, how: str) -> str:
    """What the client shows is what was sent to it."""
    assert [event["outcome"] for event in seen.events] == ["answered"] * len(seen.events) and seen.events, seen.output
    assert all(event["stream"] == (how == "stream") for event in seen.events)
    sent = [event["answers"][0]["content"] for event in seen.events]
    if client.reports:
        assert json.loads(seen.text)["text"] in sent, (seen.output, sent)
    else:
        shown = "".join(client.shown(seen.text).split())
        assert any("".join(text.split()) in shown and text.strip() for text in sent), (seen.output, sent)
    return sent[-1]


# What each must be able to do ----------------------------------------------------------------------------------------------

each_client = pytest.mark.parametrize("client", CLIENTS, ids=[client.name for client in CLIENTS])
OWN_INSTRUCTIONS = ("aider", "continue")
"""Clients that put pages of their own before the question: what the tiny model answers to those, nobody has taught it."""


@each_client
@pytest.mark.parametrize("how", ["plain", "stream"])
def test_a_client_shows_the_answer_that_was_sent(client, how, served, tmp_path):
    if how not in client.hows:
        pytest.skip(f"{client.name} has no way to ask for this")
    seen = do(client, served, tmp_path, how)
    assert seen.code == 0, seen.output
    if client.name == "lm-eval":
        [samples] = tmp_path.rglob("samples_*.jsonl")
        assert json.loads(samples.read_text())["exact_match"] == 1.0
        return
    answer = require_truth(client, seen, how)
    if client.name not in OWN_INSTRUCTIONS:
        assert answer == ANSWERS["count"]


@each_client
def test_a_client_says_that_a_model_does_not_exist(client, served, tmp_path):
    seen = do(client, served, tmp_path, "stream", model="nobody")
    assert UNKNOWN in " ".join(seen.output.split()), seen.output  # some wrap their lines


@each_client
def test_a_client_says_that_a_prompt_is_too_long(client, served, tmp_path):
    seen = do(client, served, tmp_path, "stream", question="long " * (WINDOW // 5 + 10))
    assert TOO_LONG in " ".join(seen.output.split()), seen.output


@each_client
def test_the_worker_stops_when_a_client_leaves(client, served, tmp_path):
    """A program of ours closes its stream and lives on; every other client gets Ctrl-C."""
    before = len(gateways.events(served.record))
    process = start(client, Ask(served.url, "endless", "go on", "leave", tmp_path))
    try:
        if client.reports:
            saw = process.stdout.readline()
            assert "text" in saw, saw + process.communicate(timeout=10)[1]
        else:
            wait_until(lambda: served.endless.health()["running"] or process.poll() is not None, "it is answered", 240)
            assert process.poll() is None, process.communicate()
            time.sleep(0.5)  # in the midst of it
            process.send_signal(signal.SIGINT)
            wait_until(lambda: process.poll() is not None or served.endless.idle(), f"{client.name} heeds Ctrl-C")
        wait_until(served.endless.idle, "the worker has stopped", STOPS_WITHIN_S)
        assert process.poll() is None or not client.reports
        wait_until(lambda: len(gateways.events(served.record)) > before, "the record has it")
        event = gateways.events(served.record)[before]
        # Of an answer that is not streamed, nothing was sent yet.
        assert event["outcome"] == "client_left" and (event["answers"] or not event["stream"])
    finally:
        process.kill()
        process.communicate()
        wait_until(served.endless.idle, "the worker is idle again")


def test_curl_and_node_are_here():
    """Where one is missing, its clients were not tried: said once more, so that nobody takes it for a pass."""
    missing = [name for name in ("curl", "node", "npm") if not shutil.which(name)]
    if missing:
        pytest.skip(f"SKIPPED ALOUD: not installed: {', '.join(missing)}")
