"""One model behind OpenAI's API, in a process of its own: `python -m fastft.serve.worker --model DIR`.

    POST /v1/chat/completions  /v1/completions      streamed or whole, several at once in one batch
    GET  /v1/models  /v1/models/{id}  /health  /metrics

When it can answer, it prints one line, "ready http://127.0.0.1:PORT/v1#NAME", on stdout. On SIGTERM or SIGINT it takes
nothing new (503), lets running answers finish for `--grace_s` seconds, ends the others with an error and exits; a second
signal does so at once. It ends in the same way when the process that started it is gone, even by kill -9.

Generation has a thread of its own (fastft.serve.worker.generation); the event loop reads, checks and writes. Prompts of
chats are tokenised as in training, so that control strings in a message stay text. Prompts of /v1/completions are the
model's raw input: control strings in them are control tokens.

It has no prefix cache, no constrained JSON and no tool calls. A request for these is refused, or the field is ignored and
named in the header x-fastft-ignored.
"""

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastft.common.command_line import parse
from fastft.common.environment import from_environment
from fastft.common.files import short_name
from fastft.errors import UserError
from fastft.serve.address import bound, is_loopback, written

logger = logging.getLogger(__name__)

MOST_ANSWERS = 256
"""The most answers to one request: its prompts times n."""
COMPLETION_TOKENS = 16
"""OpenAI's default for max_tokens of /v1/completions."""


@dataclass
class WorkerConfig:
    model: str
    """A model's directory, or its name on the Hugging Face Hub."""
    name: str | None = None
    """The name under which it is served (default: the directory's)."""
    host: str = "127.0.0.1"
    """Address to listen on. Other than this machine's own needs --api_key_env."""
    port: int = 0
    """Port to listen on; 0 takes a free one, which the ready line names."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on GPUs and on CPUs that compute in it, else float32."""
    repeatable: bool = False
    """Compute in float32: the same seed gives the same answer alone and in a batch."""
    max_batch: int = 16
    """Answers that are generated at once."""
    max_queue: int = 64
    """Answers that may wait for a place; beyond that, requests get 429 with Retry-After."""
    template: str | None = None
    """Built-in chat template or .jinja file (default: the tokenizer's own)."""
    api_key_env: str | None = None
    """Environment variable with the key that requests must bring."""
    grace_s: float = 25.0
    """Seconds that running answers have to finish after SIGTERM."""
    comment_s: float = 10.0
    """Seconds between the comment lines of a stream that waits, which keep proxies from giving up."""
    slow_client_s: float = 60.0
    """Seconds after which a client that reads nothing is dropped."""
    announce: str | None = None
    """A gateway's address, such as http://10.0.0.1:8000. The worker announces itself there, and signs off before it ends,
    on SIGTERM or on the cloud's notice that it will take the spot machine away."""
    announce_key_env: str | None = None
    """Environment variable with the gateway's admin key, for --announce."""
    outlive_parent: bool = False
    """Go on when the process that started this one ends (nohup)."""


# The model -----------------------------------------------------------------------------------------------------------------


class ServedModel:
    """A model with its tokenizer and chat template. It turns requests into prompts and tokens into text."""

    def __init__(self, config: WorkerConfig):
        """Load the model. Raises UserError if the directory contains no chat model."""
        import torch

        from fastft.data.template.chat_template import load_tokenizer, template_for
        from fastft.inference.detokenize import TokenBytes
        from fastft.inference.engine import load_weights
        from fastft.model.pretrained import load_config

        model_config = load_config(config.model).get_text_config(decoder=True)
        self.name = config.name or short_name(config.model)
        self.context_length = getattr(model_config, "max_position_embeddings", None) or 1 << 20
        self.tokenizer = load_tokenizer(config.model)
        self.template = template_for(self.tokenizer, config.template, self.name)
        self.token_bytes = TokenBytes(self.tokenizer, config.model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = _dtype(config, self.device)
        self.model = load_weights(config.model, getattr(torch, self.dtype)).to(self.device)
        self.known_tokens = self.model.get_input_embeddings().num_embeddings
        ends = self.model.generation_config.eos_token_id
        self.stop_ids = {*self.template.stop_token_ids, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.created = int(time.time())

    def chat_prompt(self, request: Any) -> list[list[int]]:
        """Token ids of a ChatRequest's messages. Raises ApiError if the template refuses them."""
        from fastft.data.template.skeleton import TemplateError
        from fastft.serve.protocol import ApiError

        try:
            return [self.template.encode_prompt(request.messages)]
        except TemplateError as error:
            raise ApiError(400, str(error), "messages", "template_refuses") from None

    def completion_prompts(self, request: Any) -> list[list[int]]:
        """Token ids of a CompletionRequest's prompts. Raises ApiError for ids that the model does not know."""
        from fastft.serve.protocol import ApiError

        prompts = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in request.prompts]
        if self.tokenizer.bos_token_id is not None:
            prompts = [ids or [self.tokenizer.bos_token_id] for ids in prompts]
        if not all(prompts):
            raise ApiError(
                400, "prompt must not be empty: this model has no token to begin with", "prompt", "invalid_value"
            )
        if wrong := [i for ids in prompts for i in ids if not 0 <= i < self.known_tokens]:
            message = f"prompt holds the token {wrong[0]}; the model knows those from 0 to {self.known_tokens - 1}"
            raise ApiError(400, message, "prompt", "invalid_value")
        return prompts

    def answers(self, request: Any, prompts: list[list[int]], chat: bool, max_rows: int) -> list[list[Any]]:
        """The answers to generate for a request, one group for each prompt. Raises ApiError if they exceed the context."""
        from fastft.inference.detokenize import AnswerText
        from fastft.inference.rows import Answering
        from fastft.serve.protocol import ApiError, context_too_long

        if request.n > max_rows:
            raise ApiError(400, f"n must be at most {max_rows} here", "n", "invalid_value")
        if len(prompts) * request.n > MOST_ANSWERS:
            raise ApiError(400, f"a request may ask for {MOST_ANSWERS} answers at most", "prompt", "invalid_value")
        asked = request.max_tokens if chat or request.max_tokens else COMPLETION_TOKENS
        for ids in prompts:
            if len(ids) + (asked or 1) > self.context_length:
                raise context_too_long(self.context_length, len(ids), asked, "messages" if chat else "prompt")
        separator = self.template.separator if chat else ""
        return [
            [
                Answering(
                    ids,
                    request.sampling,
                    asked or self.context_length - len(ids),
                    AnswerText(self.token_bytes, request.stop, separator),
                    choice=choice,
                    ignore_end=request.ignore_eos,
                    top_logprobs=request.top_logprobs,
                )
                for choice in range(request.n)
            ]
            for ids in prompts
        ]

    def cache_memory(self) -> int:
        """Bytes for the keys and values of all rows: 80 % of a GPU's free memory, or half of the machine's."""
        import torch

        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0] * 0.8)
        return available_memory() // 2


def available_memory() -> int:
    """Bytes that this process may still use: the machine's, or fewer where a container has a limit.

    The pages of files count as available, because the system gives them up; mapped weights have just filled many.
    """
    left = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # where the system tells nothing better
    with contextlib.suppress(OSError, IndexError, ValueError):
        left = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # no limit is the word "max"
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        left = min(left, max(limit - used, 0))
    return left


def _dtype(config: WorkerConfig, device: Any) -> str:
    if config.repeatable:
        if config.dtype not in ("auto", "float32"):
            raise UserError(f"--repeatable computes in float32; leave --dtype {config.dtype} out")
        return "float32"
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if device.type == "cuda" or _cpu_computes_bfloat16() else "float32"


def _cpu_computes_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions. Without them bfloat16 is several times slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


# The app -------------------------------------------------------------------------------------------------------------------


def application(config: WorkerConfig) -> Any:
    """Load the model and return the worker's ASGI application, to be run by another server, such as Ray Serve.

    Call it within the event loop that will serve it. That server decides where to listen and how to drain.
    """
    served = ServedModel(config)
    return _app(config, served, _generation(config, served))


def _app(config: WorkerConfig, served: ServedModel, generation: Any) -> Any:
    from fastft.serve.worker.app import build_app
    from fastft.serve.worker.responses import Patience

    return build_app(served, generation, Patience(config.comment_s, config.slow_client_s), _key(config))


def _generation(config: WorkerConfig, served: ServedModel) -> Any:
    from fastft.inference.rows import StepLoop
    from fastft.serve.worker.generation import Generation

    steps = StepLoop(served.model, served.stop_ids, served.context_length, config.max_batch, served.cache_memory())
    if steps.why_alone:
        logger.warning("%s answers one request at a time: %s", served.name, steps.why_alone)
    logger.info("%s: %s on %s, up to %d answers at once", served.name, served.dtype, served.device, steps.max_rows)
    return Generation(steps, config.max_queue)


def _key(config: WorkerConfig) -> bytes | None:
    """The key that requests must send; None if none is required. Raises UserError if it is required but not set."""
    if config.api_key_env:
        return from_environment("--api_key_env", config.api_key_env).encode()
    if not is_loopback(config.host):
        raise UserError(f"--host {config.host}: others can reach this address; give a key with --api_key_env NAME")
    return None


# The process ---------------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    parent = os.getppid()  # read before anything slow, so that a parent that ends meanwhile is noticed
    try:
        import uvloop
    except ImportError:
        raise UserError("serving needs packages that are not installed: pip install 'fastft[serve]'") from None
    description = "Serve one model over OpenAI's API, in this process."
    [config] = parse(argv, "python -m fastft.serve.worker", description, WorkerConfig)
    _check(config)
    _key(config)
    gateway = _gateway(config)
    with bound(config.host, config.port) as listener:
        served = ServedModel(config)
        uvloop.run(_serve(config, served, listener, None if config.outlive_parent else parent, gateway))
    return 0


def _gateway(config: WorkerConfig) -> Any:
    """The GatewayAddress to announce to, or None. Raises UserError for one that cannot be reached in this way."""
    if config.announce is None:
        return None
    from fastft.serve.announce import GatewayAddress

    if not config.announce_key_env:
        raise UserError(
            "--announce needs --announce_key_env NAME, the environment variable with the gateway's admin key"
        )
    key = from_environment("--announce_key_env", config.announce_key_env)
    return GatewayAddress(config.announce, key, config.api_key_env)


def _check(config: WorkerConfig) -> None:
    for name, least in (("max_batch", 1), ("max_queue", 0), ("grace_s", 0)):
        if getattr(config, name) < least:
            raise UserError(f"--{name} {getattr(config, name)}: must be {least} or more")
    for name in ("comment_s", "slow_client_s"):
        if getattr(config, name) <= 0:
            raise UserError(f"--{name} {getattr(config, name)}: must be more than 0")


async def _serve(
    config: WorkerConfig, served: ServedModel, listener: socket.socket, parent: int | None, gateway: Any
) -> None:
    from fastft.serve.ready_server import ReadyServer, in_background

    generation = _generation(config, served)
    host, port = listener.getsockname()[:2]
    url = f"http://{written(host, port)}/v1#{served.name}"

    application = _app(config, served, generation)
    server = ReadyServer(application, lambda: print(f"ready {url}", flush=True))
    loop = asyncio.get_running_loop()
    presence = _Presence(gateway, config, port, served.name) if gateway else None
    ending: list[asyncio.Task] = []
    signals: list[None] = []

    def end(within_s: float = config.grace_s) -> None:
        if not ending:
            ending.append(in_background(_drain(generation, server, min(within_s, config.grace_s), presence)))

    def on_signal() -> None:
        """The first one begins the end, as a cloud's notice may have done before; the second one does not wait."""
        end()
        if signals:
            generation.finish_at_once()
            server.should_exit = True
        signals.append(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    if parent is not None:
        _watch_parent(parent, lambda: loop.call_soon_threadsafe(end), config.grace_s)
    if presence:
        presence.begin(lambda seconds: loop.call_soon_threadsafe(end, seconds))
    await server.serve(sockets=[listener])


class _Presence:
    """Keeps the worker announced at its gateway, and ends it when the cloud says that it will take the machine away."""

    reason: str | None = None
    save_soon = False

    def __init__(self, gateway: Any, config: WorkerConfig, port: int, name: str):
        from fastft.serve.announce import reachable_url

        self.gateway = gateway
        self.url = f"{reachable_url(config.host, port, gateway.url)}#{name}"

    def begin(self, end: Callable[[float], None]) -> None:
        """Announce the worker from now on; on a cloud's notice call `end` with the seconds that are left."""
        from fastft.serve.announce import announce
        from fastft.serve.ready_server import in_background
        from fastft.train.preemption import notices

        self.end = end
        self.task = in_background(announce(self.gateway, self.url))
        notices.watch(self)

    def set(self, reason: str, seconds: float) -> None:
        """What `notices` calls, in its thread, as it does on a trainer's StopFlag."""
        logger.warning("%s: the machine is taken away in %.0f s", reason, seconds)
        self.reason = reason
        self.end(max(1.0, seconds - 5))

    async def leave(self) -> None:
        from fastft.serve.announce import take_leave

        self.task.cancel()
        await take_leave(self.gateway, self.url)


async def _drain(generation: Any, server: Any, grace_s: float, presence: _Presence | None) -> None:
    """Accept no more requests, wait up to `grace_s` for running answers, and end the rest with an error."""
    deadline = time.monotonic() + grace_s
    try:
        if presence:
            await presence.leave()  # first, so that new requests go to other workers instead of being refused here
        generation.draining = True
        logger.info("shutting down: %d requests have %g s to finish", len(generation.jobs), grace_s)
        while generation.jobs and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
    finally:
        generation.finish_at_once()
        server.should_exit = True


def _mute_unread() -> None:
    """Redirect stdout and stderr to /dev/null if their reader is gone, because the next write would raise an error."""
    for stream in (sys.stdout, sys.stderr):
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # poll reports errors even with an empty mask
        if poll.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _watch_parent(parent: int, end: Callable[[], None], grace_s: float) -> None:
    """Call `end` when the process `parent`, which started this one, is gone; exit 10 s after the grace time in any case."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        _mute_unread()
        logger.warning("the process that started this worker is gone")
        end()
        time.sleep(grace_s + 10)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
