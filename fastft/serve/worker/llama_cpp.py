"""Serve a GGUF file over OpenAI's API with llama.cpp, in a process of its own: `python -m fastft.serve.worker.llama_cpp --model
FILE.gguf`.

When it can answer, it prints one line, "ready http://127.0.0.1:PORT/v1#NAME", on stdout. It ends with the process that
started it, even by kill -9. The engine is the package xllamacpp (wheels for CPUs and Apple's GPUs).

It differs from our worker in four ways: control strings that a user types become control tokens; its default min_p applies
unless a request sets `min_p: 0`; it supports JSON schemas; and it reuses the cache of a common prefix.
"""

import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from fastft.common import logs
from fastft.common.command_line import leave, parse, run
from fastft.common.environment import from_environment
from fastft.common.files import short_name
from fastft.errors import UserError
from fastft.serve.address import check_port

PARALLEL = 8
"""Answers that are generated at once."""
LARGEST_PROMPT_PIECE = 256
"""Prompt tokens in one step. llama.cpp's default of 2,048 puts the prompts of all requests into one step, so that all first
tokens come at its end; with 256 they come one after the other."""


@dataclass
class LlamaConfig:
    model: str
    """A GGUF file."""
    name: str | None = None
    """The name under which it is served (default: the file's)."""
    port: int = 0
    """Port on this machine; 0 takes a free one, which the ready line names."""
    api_key_env: str | None = None
    """Environment variable with the key that requests must bring."""


def main(argv: list[str]) -> int:
    parent = os.getppid()
    [config] = parse(argv, "python -m fastft.serve.worker.llama_cpp", "Serve a GGUF file, by llama.cpp.", LlamaConfig)
    _check_file(config.model)
    check_port(config.port)
    key = from_environment("--api_key_env", config.api_key_env) if config.api_key_env else None
    try:
        import xllamacpp
    except ModuleNotFoundError:
        raise UserError("GGUF files need llama.cpp: pip install 'fastft[llamacpp]'") from None
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    name = config.name or short_name(config.model)
    parameters = _parameters(xllamacpp, config, name, key)
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as error:
        raise UserError(f"{config.model}: llama.cpp cannot load it ({error})") from None
    print(f"ready {server.listening_address}/v1#{name}", flush=True)
    while not stop.wait(0.5) and os.getppid() == parent:
        pass
    return 0


def _parameters(xllamacpp, config: LlamaConfig, name: str, key: str | None):
    found = xllamacpp.CommonParams()
    found.model.path = config.model
    found.model_alias = {name}
    found.hostnames, found.port = ["127.0.0.1"], config.port
    found.cors_origins, found.cors_credentials = "", False  # its default accepts requests from the pages of all sites
    found.ui = found.endpoint_slots = False  # /slots would show other users' requests
    found.verbosity = 1
    found.n_parallel = PARALLEL
    found.kv_unified = True  # otherwise each parallel answer gets only an eighth of the context
    found.n_ctx = 0  # the model's own context length
    found.n_batch = LARGEST_PROMPT_PIECE
    found.api_keys = [key] if key else []
    return found


def _check_file(path: str) -> None:
    """Raises UserError if the file is missing or not GGUF."""
    if not Path(path).is_file():
        raise UserError(f"--model {path}: no such file")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"--model {path}: is no GGUF file (it does not begin with GGUF)")


if __name__ == "__main__":
    logs.show()
    leave(run(lambda: main(sys.argv[1:])))
