"""Serve models: `fastft serve --model DIR [--model name=DIR2]`, all behind one address that speaks OpenAI's API.

    fastft serve --model runs/mine/model
    fastft serve --model runs/mine/model --model old=runs/old/model --record records
    fastft serve --model small.gguf                      # by llama.cpp
    fastft serve --config serve.yaml                     # workers elsewhere, virtual models, keys: see docs/serve.md

Each directory gets a worker, a process of its own; this process is the gateway before them. When all are ready it prints one
line, "ready http://127.0.0.1:8000/v1 …", on stdout. On SIGTERM or SIGINT it takes nothing new, lets running answers finish
for `--grace_s` seconds, ends the others with an error, and ends its workers; a second signal does so at once.
"""

import asyncio
import hashlib
import logging
import os
import re
import secrets
import signal
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.common.command_line import parse, run_module
from fastft.common.environment import from_environment
from fastft.common.files import make_directory, short_name, split_name
from fastft.common.urls import parse_http
from fastft.compose.abtest.policy import Experiment
from fastft.compose.router.policy import RoutePolicy
from fastft.compose.virtual import VirtualModels
from fastft.errors import UserError
from fastft.serve.address import check_port
from fastft.serve.local import (
    Engine,
    LocalWorker,
    engine_of_template,
    is_gguf,
    keep_running,
    llama_cpp_engine,
    our_engine,
)
from fastft.serve.settings import ModerationConfig, RemoteWorker, ServeConfig
from fastft.serve.virtual_models import virtual_models

logger = logging.getLogger(__name__)

FOR_OUR_ENGINE = ("dtype", "repeatable", "max_batch", "max_queue", "template")
"""Options of `fastft serve` that are passed to our own engine."""
UNIT_KEY = "unit.key"
"""The file beside the record with the key of the hash that stands for users."""
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclass
class _Plan:
    """What is to be served, derived from the configuration."""

    local: dict[str, tuple[str, Engine]]
    """Local models by name: the directory or file, and the engine that runs it."""
    remote: list[RemoteWorker]
    virtual: VirtualModels


def main(argv: list[str]) -> int:
    description = "Serve models behind one address that speaks OpenAI's API."
    [config] = parse(argv, "fastft serve", description, ServeConfig)
    check_port(config.port)
    plan = _plan(config)
    try:
        import prometheus_client  # noqa: F401

        from fastft.serve.gateway import app  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"fastft serve needs {error.name}: pip install 'fastft[serve]'") from None
    from fastft.serve.address import bound

    settings = _settings(config, plan.virtual)
    from fastft.serve.check import doubts, show

    if config.check:
        show(config, plan.local, plan.remote, plan.virtual)
        return 0
    for line in doubts(config, plan.virtual):
        logger.warning("%s", line)
    remote = _remote_workers(plan)
    with bound(config.host, config.port) as listener:
        local: list[LocalWorker] = []
        try:
            for name, (model, engine) in plan.local.items():
                local.append(LocalWorker(name, model, engine))
            for worker in local:
                worker.wait_until_ready()
            _run(_serve(config, settings, listener, local, remote, plan.virtual))
        finally:
            for worker in local:
                worker.terminate()
            for worker in local:
                worker.wait(config.grace_s)
    return 0


def _run(coroutine: Any) -> None:
    try:
        import uvloop
    except ModuleNotFoundError:
        asyncio.run(coroutine)
    else:
        uvloop.run(coroutine)


# The configuration ---------------------------------------------------------------------------------------------------------


def _plan(config: ServeConfig) -> _Plan:
    """Check the configuration. Raises UserError for what cannot be served as asked."""
    local: dict[str, tuple[str, Engine]] = {}
    remote = list(config.workers)
    engine = _engine(config)
    for entry in config.model:
        if entry.startswith(("http://", "https://")):
            remote.append(RemoteWorker(entry))
            continue
        name, model = split_name(entry)
        name = name or short_name(model.removesuffix(".gguf"))
        _check_model(model, config.engine)
        if name in local:
            raise UserError(
                f"--model {entry}: {local[name][0]} is called {name!r}, too; give one another name: NAME={model}"
            )
        local[name] = (model, llama_cpp_engine() if is_gguf(model) and config.engine == "fastft" else engine)
    for worker in remote:
        _check_remote(worker, local)
    if local and (unused := _for_our_engine(config)) and not any(each == engine for _, each in local.values()):
        raise UserError(f"--{unused[0]} is for our own engine; GGUF files run in llama.cpp, which does not know it")
    if not local and not remote and not config.admin_key_env:
        raise UserError("there is nothing to serve: name a directory with --model DIR, or workers in --config FILE")
    served = [*local, *dict.fromkeys(worker.served_name for worker in remote)]
    for name in ("grace_s", "comment_s", "slow_client_s", "silence_s", "check_s"):
        if not getattr(config, name) > 0:
            raise UserError(f"--{name} {getattr(config, name)}: must be more than 0")
    return _Plan(local, remote, virtual_models(config.virtual, served))


def _for_our_engine(config: ServeConfig) -> list[str]:
    """Names of the options that were given for our own engine."""
    defaults = ServeConfig()
    return [name for name in FOR_OUR_ENGINE if getattr(config, name) != getattr(defaults, name)]


def _engine(config: ServeConfig) -> Engine:
    """The engine that runs the model directories. Raises UserError for an option that does not fit it."""
    for_ours = _for_our_engine(config)
    if config.engine != "fastft":
        if for_ours:
            raise UserError(f"--{for_ours[0]} is for our own engine; --engine {config.engine} does not know it")
        return llama_cpp_engine() if config.engine == "llama.cpp" else engine_of_template(config.engine)
    flags = ["--grace_s", str(config.grace_s), "--comment_s", str(config.comment_s)]
    for name in for_ours:
        value = getattr(config, name)
        flags += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return our_engine(*flags)


def _check_model(directory: str, engine: str) -> None:
    path = Path(directory)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"--model {directory}: no such file")
        return
    if engine == "llama.cpp":
        raise UserError(
            f"--model {directory}: llama.cpp reads GGUF files; make one with llama.cpp's convert_hf_to_gguf.py, or leave "
            "--engine out"
        )
    if not path.is_dir():
        raise UserError(f"--model {directory}: no such directory")
    if not (path / "config.json").is_file():
        inside = [str(each.parent) for each in sorted(path.glob("*/config.json"))]
        hint = f"; {inside[0]} is one" if inside else ""
        raise UserError(f"--model {directory}: holds no model (there is no config.json){hint}")


def _check_remote(worker: RemoteWorker, local: Collection[str]) -> None:
    url, _, model = worker.url.partition("#")
    if not parse_http(url) or not model:
        raise UserError(f"workers: {worker.url}: must be URL#MODEL, such as http://10.0.0.5:8000/v1#qwen")
    if worker.served_name in local:
        raise UserError(
            f"workers: {worker.url}: a directory is called {worker.served_name!r}, too; give it another name"
        )
    if worker.key_env:
        from_environment(f"workers: {worker.url}: key_env", worker.key_env)


def _settings(config: ServeConfig, virtual: VirtualModels) -> Any:
    """The gateway's settings, with the keys. Raises UserError if one is missing."""
    from fastft.serve.address import is_loopback
    from fastft.serve.gateway.app import GatewaySettings
    from fastft.serve.gateway.keys import ApiKey

    keys = [ApiKey(key.name, key.sha256, key.per_minute) for key in config.keys]
    for key in keys:
        if not _SHA256.fullmatch(key.sha256):
            how = 'printf %s "$KEY" | sha256sum'
            raise UserError(f"keys: {key.name}: sha256 must be 64 hexadecimal digits, the key's hash: {how}")
        if key.per_minute is not None and key.per_minute < 1:
            raise UserError(f"keys: {key.name}: per_minute must be 1 or more")
    if len({key.name for key in keys}) < len(keys):
        raise UserError("keys: two of them have the same name")
    if config.api_key_env:
        digest = hashlib.sha256(from_environment("--api_key_env", config.api_key_env).encode()).hexdigest()
        keys.append(ApiKey(config.api_key_env, digest))
    if not keys and not is_loopback(config.host):
        raise UserError(f"--host {config.host}: others can reach this address; give a key with --api_key_env NAME")
    return GatewaySettings(
        host=config.host,
        keys=keys,
        admin_key=from_environment("--admin_key_env", config.admin_key_env) if config.admin_key_env else None,
        origins=config.origins,
        key_envs=[*(worker.key_env for worker in config.workers if worker.key_env), *config.worker_key_envs],
        comment_s=config.comment_s,
        slow_client_s=config.slow_client_s,
        moderation=_moderation(config.moderation),
        unit_key=_unit_key(config, virtual),
    )


def _unit_key(config: ServeConfig, virtual: VirtualModels) -> bytes | None:
    """The key of the hash that stands for users in the record; None if no experiment is recorded."""
    if config.unit_key_env:
        return hashlib.sha256(from_environment("--unit_key_env", config.unit_key_env).encode()).digest()
    if config.record is None or config.check or not any(isinstance(each, Experiment) for each in virtual.values()):
        return None
    path = Path(config.record) / UNIT_KEY
    make_directory(path.parent)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:  # units must stay the same over restarts
        pass
    if not re.fullmatch("[0-9a-f]{64}", key := path.read_text(encoding="ascii", errors="replace")):
        raise UserError(f"{path}: is not a key; remove it, and users get other units in the record from now on")
    return bytes.fromhex(key)


def _moderation(config: ModerationConfig) -> Any:
    from fastft.serve.moderation import ModerationSettings

    if config.url is None:
        return None
    if not parse_http(config.url):
        raise UserError(f"moderation.url {config.url}: must be an http(s) address")
    key = from_environment("moderation.key_env", config.key_env) if config.key_env else None
    return ModerationSettings(config.url, config.model, key, closed=config.fail == "closed")


def _remote_workers(plan: _Plan) -> list[Any]:
    from fastft.serve.gateway.pool import PoolWorker

    found = []
    for worker in plan.remote:
        url, _, model = worker.url.partition("#")
        key = os.environ[worker.key_env] if worker.key_env else None
        found.append(PoolWorker(url.rstrip("/"), model, worker.served_name, key))
    return found


# Serving -------------------------------------------------------------------------------------------------------------------


async def _serve(
    config: ServeConfig,
    settings: Any,
    listener: socket.socket,
    local: list[LocalWorker],
    remote: list[Any],
    virtual: VirtualModels,
) -> None:
    from fastft.serve.address import written
    from fastft.serve.gateway.app import Gateway
    from fastft.serve.gateway.events import EventLog
    from fastft.serve.gateway.pool import PoolWorker, WorkerPool
    from fastft.serve.gateway.server import serve
    from fastft.serve.ready_server import in_background

    for each in virtual.values():
        if isinstance(each, RoutePolicy):
            await asyncio.to_thread(each.load)
    pool = WorkerPool(silence_s=config.silence_s, check_s=config.check_s)
    await pool.open()

    def add(worker: LocalWorker) -> PoolWorker:
        return pool.add(PoolWorker(worker.url, worker.name, worker.name, worker.key))

    for worker in local:
        worker.in_pool = add(worker)
    for worker in remote:
        pool.add(worker)
    record = EventLog(Path(config.record), config.record_texts) if config.record else None
    gateway = Gateway(pool, settings, virtual, record)
    stop = _stop_on_signals(gateway)

    def ready() -> None:
        names = ", ".join([*virtual, *pool.names()])
        address = f"http://{written(*listener.getsockname()[:2])}"
        print(f"ready {address}/v1 models: {names}; page: {address}/", flush=True)

    watch = in_background(keep_running(local, pool, add))
    try:
        await serve(gateway, listener, ready, stop, config.grace_s)
    finally:
        watch.cancel()
        for worker in local:
            worker.terminate()  # even one that is restarting, because waiting for it would delay the end of the loop
        if record:
            record.close()


def _stop_on_signals(gateway: Any) -> asyncio.Event:
    """An event that is set by the first SIGTERM or SIGINT. A second signal ends everything that still runs."""
    stop = asyncio.Event()

    def end() -> None:
        if stop.is_set():
            for exchange in list(gateway.running):
                exchange.cancel("shut_down")
        else:
            logger.info("shutting down: %d requests may finish", len(gateway.running))
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end)
    return stop


if __name__ == "__main__":
    run_module(main)
