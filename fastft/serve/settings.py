"""The options of `fastft serve`, which are the keys of its file, too."""

from dataclasses import dataclass, field
from typing import Literal

from fastft.common.command_line import option
from fastft.serve.virtual_models import VirtualModel


@dataclass
class RemoteWorker:
    """A model at another address."""

    url: str
    """URL#MODEL, such as http://10.0.0.5:8000/v1#qwen."""
    name: str | None = None
    """The name under which it is served (default: MODEL)."""
    key_env: str | None = None
    """Environment variable with the key for that address."""

    @property
    def served_name(self) -> str:
        return self.name or self.url.partition("#")[2]


@dataclass
class KeyConfig:
    """An API key."""

    name: str
    """For the record and the metrics."""
    sha256: str
    """The key's SHA-256: printf %s "$KEY" | sha256sum"""
    per_minute: int | None = None
    """Requests a minute; no limit without."""


@dataclass
class ModerationConfig:
    url: str | None = None
    """An OpenAI-compatible moderation endpoint, such as https://api.openai.com/v1/moderations. Without it, nothing is
    checked."""
    model: str | None = None
    """The model to name there."""
    key_env: str | None = None
    """Environment variable with the key for it."""
    fail: Literal["open", "closed"] = "open"
    """While it cannot be reached: open answers questions and records that they were not checked; closed refuses them."""


@dataclass
class ServeConfig:
    model: list[str] = option(several=True)
    """Models' directories or GGUF files, each DIR or name=DIR, or models elsewhere, URL#name; the option can be repeated."""
    host: str = "127.0.0.1"
    """Address to listen on. Others than this machine's own need a key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one, which the ready line names."""
    engine: str = "fastft"
    """The engine for model directories: fastft, llama.cpp (always used for GGUF files), or a command with {model}, {name}
    and {port}, such as "vllm serve {model} --served-model-name {name} --port {port}"."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of our engine's weights; auto: bfloat16 on GPUs and on CPUs that compute in it, else float32."""
    repeatable: bool = False
    """Let our engine compute in float32: the same seed gives the same answer alone and in a batch."""
    max_batch: int = 16
    """Answers that a worker of ours generates at once."""
    max_queue: int = 64
    """Answers that may wait for a worker of ours; beyond that, requests get 429 with Retry-After."""
    template: str | None = None
    """Built-in chat template or .jinja file for our engine (default: each tokenizer's own)."""
    record: str | None = None
    """Directory for the record of served turns; without, nothing is recorded."""
    record_texts: bool = True
    """Record messages and answers; false: their hashes only."""
    workers: list[RemoteWorker] = field(default_factory=list)
    """Models at other addresses."""
    virtual: list[VirtualModel] = field(default_factory=list)
    """Names with a policy that chooses the model."""
    unit_key_env: str | None = None
    """Environment variable with the key of the hash that stands for a user in the record of an experiment; by default a
    random key, which is kept beside the record."""
    check: bool = False
    """Start nothing and ask nobody: say what each name would do, and what is wrong or doubtful."""
    keys: list[KeyConfig] = field(default_factory=list)
    """API keys, as hashes."""
    api_key_env: str | None = None
    """Environment variable with an API key; for more than one, use keys."""
    admin_key_env: str | None = None
    """Environment variable with the key for /admin/workers."""
    worker_key_envs: list[str] = field(default_factory=list)
    """Environment variables with keys of workers that announce themselves."""
    moderation: ModerationConfig = field(default_factory=ModerationConfig)
    """The moderation endpoint that checks what users write before a model reads it."""
    origins: list[str] = field(default_factory=list)
    """Other sites whose pages may send requests, such as https://chat.example.org."""
    grace_s: float = 25.0
    """Seconds that running answers have to finish after SIGTERM."""
    comment_s: float = 10.0
    """Seconds between the comment lines of a stream that waits, which keep proxies from giving up."""
    slow_client_s: float = 60.0
    """Seconds after which a client that reads nothing is dropped."""
    silence_s: float = 600.0
    """Seconds after which a worker that sends nothing is given up."""
    check_s: float = 5.0
    """Seconds between two health checks of a worker."""
