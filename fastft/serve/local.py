"""Workers on this machine: processes that `fastft serve` starts, watches, and starts again when one ends by itself.

    workers = [LocalWorker("mine", "runs/mine/model", engine)]
    workers[0].wait_until_ready()
    await keep_running(workers, pool)

An engine is a command. Ours and llama.cpp's print the line "ready URL#NAME"; any other engine is ready when it lists its
model at /v1/models. Each worker is in a session of its own: Ctrl-C is for the gateway, which ends its workers when their
answers are finished.
"""

import asyncio
import collections
import json
import logging
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from fastft.common import logs
from fastft.errors import UserError

logger = logging.getLogger(__name__)

WORKER_KEY = "FASTFT_WORKER_KEY"
"""Environment variable in which a worker gets the key that only its gateway knows."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Seconds before a worker that ended by itself is restarted: the first pause, doubled each time up to the longest."""
STEADY_S = 300.0
"""A worker that ran for so many seconds counts as stable: after its next end, the pause is the shortest again."""
LAST_LINES = 20
"""Lines of a worker's stderr that are kept for the message about a failed start."""
FIELDS = {"model", "name", "port"}
"""The names that a command template may contain in braces."""


@dataclass(frozen=True)
class Engine:
    """How a worker process is started, and how it is known to be ready."""

    command: tuple[str, ...]
    """The program and its arguments, with {model}, {name} and {port} in them."""
    says_ready: bool = False
    """Whether it prints "ready URL#NAME" on stdout when it can answer, and asks for the key in FASTFT_WORKER_KEY."""

    def fill(self, model: str, name: str, port: int) -> list[str]:
        return [part.format(model=model, name=name, port=port) for part in self.command]


def our_engine(*options: str) -> Engine:
    """The embedded engine: fastft.serve.worker."""
    start = (sys.executable, "-m", "fastft.serve.worker", "--model", "{model}", "--name", "{name}")
    escaped = (option.replace("{", "{{").replace("}", "}}") for option in options)
    return Engine((*start, "--api_key_env", WORKER_KEY, *escaped), says_ready=True)


def llama_cpp_engine() -> Engine:
    """llama.cpp, for a GGUF file: fastft.serve.worker.llama_cpp."""
    return Engine(
        (sys.executable, "-m", "fastft.serve.worker.llama_cpp", "--model", "{model}", "--name", "{name}"),
        says_ready=True,
    )


def engine_of_template(template: str) -> Engine:
    """Any other engine, such as "vllm serve {model} --served-model-name {name} --port {port}". Raises UserError."""
    try:
        command = tuple(shlex.split(template))
        fields = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise UserError(f"--engine {template}: {error}") from None
    if unknown := fields - FIELDS:
        raise UserError(
            f"--engine {template}: {{{min(unknown)}}} is unknown; a command may hold {{model}}, {{name}} and {{port}}"
        )
    if not {"model", "port"} <= fields:
        raise UserError(
            f"--engine {template}: must be fastft, llama.cpp, or a command with {{model}} and {{port}}, such as "
            "'vllm serve {model} --served-model-name {name} --port {port}'"
        )
    return Engine(command)


class LocalWorker:
    """A worker process on a model. Ours notices by itself when this process is gone; others are ended by `terminate`."""

    def __init__(self, name: str, model: str, engine: Engine):
        self.name, self.model, self.engine = name, model, engine
        self.key = secrets.token_hex(16) if engine.says_ready else None
        self.url = ""
        self.ended = False  # by us
        self.in_pool: Any = None
        self.start()

    # Start and end ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process, for the first time or again. Raises UserError if there is no such program."""
        logger.info("%s: starting a worker on %s", self.name, self.model)
        self.started_at = time.monotonic()
        self.url, self.said = "", []
        self.port = 0 if self.engine.says_ready else _free_port()
        command = self.engine.fill(self.model, self.name, self.port)
        try:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE if self.engine.says_ready else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**os.environ, **({WORKER_KEY: self.key} if self.key else {})},
                start_new_session=True,
                preexec_fn=None if self.engine.says_ready else _end_with_parent(),
            )
        except OSError as error:
            raise UserError(f"the worker of {self.name}: {command[0]}: {error.strerror}") from None
        self.relay = threading.Thread(target=self._relay, name=f"stderr of {self.name}", daemon=True)
        self.relay.start()

    def wait_until_ready(self) -> None:
        """Set `url`. Raises UserError with the worker's own words if it ends before."""
        ready = self._ready_line if self.engine.says_ready else self._ready_at_port
        if url := ready():
            self.url = url
            return
        self.process.wait()
        self.relay.join(5)
        if errors := [line for line in self.said if line.startswith("error: ")]:
            raise UserError(f"the worker of {self.name}: {errors[-1].removeprefix('error: ')}")
        last = [line for line in self.said if line.strip()][-1:] or ["it said nothing"]
        raise UserError(f"the worker of {self.name} ended with code {self.process.returncode}: {last[0]}")

    def _ready_line(self) -> str | None:
        for line in self.process.stdout:
            if line.startswith("ready "):
                # What follows is for nobody, but a pipe that is full would stop the worker.
                threading.Thread(target=collections.deque, args=(self.process.stdout, 0), daemon=True).start()
                return line.split()[1].partition("#")[0]
        return None

    def _ready_at_port(self) -> str | None:
        """Wait until the engine lists its model.

        There is no limit, because large models load for minutes; Ctrl-C ends the wait.
        """
        url = f"http://127.0.0.1:{self.port}/v1"
        while self.process.poll() is None:
            if served := _models_at(url):  # an engine that lists nothing is still loading
                if self.name not in served:
                    self._signal(signal.SIGTERM)
                    hint = "" if "{name}" in " ".join(self.engine.command) else "; give the command {name}"
                    raise UserError(f"the worker of {self.name} serves {', '.join(served)}, not {self.name}{hint}")
                return url
            time.sleep(0.25)
        return None

    def _relay(self) -> None:
        """Log the worker's stderr with its name in front. Until it is ready, an error is kept for `wait_until_ready`."""
        for line in self.process.stderr:
            line = line.rstrip("\n")
            if not self.url:
                self.said = [*self.said[-LAST_LINES:], line]
            if self.url or not line.startswith("error: "):
                # Written as it is, because a line of the worker's log begins with its own level already.
                logs.write(f"[{self.name}] {line}\n")

    def terminate(self) -> None:
        """Ask the worker, and the processes that it started, to end."""
        self.ended = True
        self._signal(signal.SIGTERM)

    def wait(self, limit_s: float) -> None:
        try:
            self.process.wait(limit_s + 10)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.process.wait()

    def _signal(self, number: int) -> None:
        if self.process.poll() is not None:
            return
        if self.engine.says_ready:
            self.process.send_signal(number)
        else:  # an engine behind a shell, or with workers of its own
            os.killpg(self.process.pid, number)


async def keep_running(workers: Sequence[LocalWorker], pool: Any, add: Callable[[LocalWorker], Any]) -> None:
    """Start workers again that end by themselves, each after a pause that doubles. Runs until it is cancelled.

    `add(worker)` puts a ready worker into the pool and returns its entry there. A worker that has ended stays in the pool as
    unhealthy, so that requests for its model get 503, not 404, until it is back.
    """
    await asyncio.gather(*(_keep_running(worker, pool, add) for worker in workers))


async def _keep_running(worker: LocalWorker, pool: Any, add: Callable[[LocalWorker], Any]) -> None:
    ends = 0
    while True:
        while worker.process.poll() is None:
            await asyncio.sleep(0.25)
        if worker.ended:
            return
        worker.in_pool.healthy = False
        ends = 1 if time.monotonic() - worker.started_at > STEADY_S else ends + 1
        pause = min(FIRST_PAUSE_S * 2 ** (ends - 1), LONGEST_PAUSE_S)
        how = _how_it_ended(worker.process.returncode)
        logger.error("the worker of %s has ended (%s); it is started again in %g s", worker.name, how, pause)
        await asyncio.sleep(pause)
        try:
            worker.start()
            await asyncio.to_thread(worker.wait_until_ready)
        except UserError as error:
            logger.error("%s", error)
            continue
        before, worker.in_pool = worker.in_pool, add(worker)
        if (before.url, before.model) != (worker.in_pool.url, worker.in_pool.model):
            pool.remove(before.url, before.model)
        logger.info("%s: its worker is back", worker.name)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"code {code}"
    name = signal.Signals(-code).name
    return f"{name}, as when memory runs out" if -code == signal.SIGKILL else name


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def _models_at(url: str) -> list[str] | None:
    """Names of the models that are served at a URL on this machine; None if nothing that speaks OpenAI's API answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine is never reached by proxy
    try:
        with opener.open(f"{url}/models", timeout=5) as response:
            return [str(each["id"]) for each in json.load(response)["data"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _end_with_parent() -> Callable[[], Any] | None:
    """A function for a new process to call first: the kernel then ends it when this process ends, even by kill -9.

    Linux only.
    """
    if sys.platform != "linux":
        return None
    import ctypes

    prctl = ctypes.CDLL(None).prctl  # looked up before the fork: an import after it could wait for ever for a lock
    return lambda: prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def is_gguf(model: str) -> bool:
    return model.endswith(".gguf") and Path(model).is_file()
