"""The configuration of a training run: read from YAML files and the command line, checked, and saved in the run's directory.

    torchrun --nproc-per-node 8 -m fastft.train --config run.yaml --optimizer.lr 1e-5

Every key is a field of `TrainConfig`. Keys of a group are written with dots on the command line. An unknown key, or a value of
the wrong type, is an error of one line that names the key and the nearest valid one.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from fastft.common.command_line import parse
from fastft.common.files import write_whole
from fastft.common.object_store import check_address
from fastft.errors import UserError

RENAMED = {"window": "seq_len"}  # keys of the last release, which still work, in a run's config.yaml, too
SYNONYMS = {  # what other projects call our keys
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_seq_length": "seq_len",
    "max_length": "seq_len",
    "sequence_len": "seq_len",
    "model_max_length": "seq_len",
    "cutoff_len": "seq_len",
    "model_name_or_path": "model",
    "base_model": "model",
    "data_path": "data",
    "dataset": "data",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "warmup_ratio": "schedule.warmup_ratio",
    "lr_scheduler_type": "schedule.name",
    "weight_decay": "optimizer.weight_decay",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "report_to": "trackers",
    "chat_template": "template",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
}

TRACKERS = ("tensorboard", "wandb", "trackio", "none")
HOURS_BETWEEN_PREEMPTIONS = 3.0
"""The assumed time between two preemptions of a node: the geometric mean of nine recorded traces of launched instances.

Hours between two preemptions: AWS V100 x 1, April 2023: 1.4, 1.8, 2.3, 3.2; AWS CPU, April 2023: 0.8, 2.0, 5.3; GCP CPU,
April 2023: 14.5 (skypilot-org/spot-traces); GCP A100 x 1, December 2021: 10.1 (uclasystem/bamboo). Little depends on it: if the
true time is four times as long, or a quarter, saves and lost work together cost 25 % more than necessary.
"""


@dataclass
class OptimizerConfig:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps the moments in 8 bits, 2 bytes a parameter instead of 8. Needs torchao: pip install "fastft[torchao]"."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of adamw's moments between steps; bfloat16 takes 4 bytes per parameter, not 8 (on GPUs torch >= 2.13)."""
    lr: float = 2e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Applied to matrices, embeddings included, but not to norms and biases."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments."""


@dataclass
class ScheduleConfig:
    """The learning rate over the run, as a function of the step alone."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Its shape after the warm-up. wsd (warm-up, stable, decay) stays at the peak until `decay_ratio` of the steps is left."""
    warmup_ratio: float = 0.03
    """Share of all steps over which the learning rate rises linearly from 0."""
    decay_ratio: float = 0.2
    """Share of all steps over which wsd decays, as 1 - sqrt(share done) (Hägele et al., 2024)."""
    min_ratio: float = 0.0
    """Learning rate at the end of the decay, as a share of the peak."""


@dataclass
class LoraConfig:
    """Low-rank adapters on frozen weights (Hu et al., 2021), with 4-bit weights as QLoRA (Dettmers et al., 2023).

    Needs peft: pip install "fastft[lora]". The adapter is exported to OUTPUT_DIR/adapter, and merged into OUTPUT_DIR/model.
    """

    r: int = 0
    """Rank of the adapters; 0 trains the whole model. Adapters need about ten times the optimizer.lr that a whole model needs."""
    alpha: float = 32.0
    """The output of an adapter is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout on the input of the adapters."""
    targets: str = "all-linear"
    """Linear layers that get an adapter, by their last name, separated by commas; by default all but the head."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4 keeps the frozen matrices of the blocks in 4 bits, whole on every GPU; needs bitsandbytes."""


@dataclass
class SourceConfig:
    """A file of conversations in a mixture."""

    path: str
    """The file."""
    weight: float = 1.0
    """How often each conversation is used in an epoch. With 2.3, every conversation is used twice, and three in ten a third
    time, different ones in each epoch. Fractions of a conversation add up over the epochs and are rounded up."""
    epochs: int | None = None
    """Use the file only in this many epochs, counted from the first; by default in all of them."""


@dataclass
class StageConfig:
    """A stage of a run, with data of its own. Its epochs, lr and schedule default to those of the run."""

    data: str | list[SourceConfig]
    """Conversations, as `data` of the run."""
    epochs: int | None = None
    """Passes over them."""
    max_steps: int | None = None
    """Stop the stage after this many optimizer steps."""
    lr: float | None = None
    """Peak learning rate."""
    schedule: ScheduleConfig | None = None
    """Learning-rate schedule over the steps of the stage."""


@dataclass
class CheckpointConfig:
    """Checkpoints in OUTPUT_DIR/checkpoints. One is always written at the end."""

    every: int | Literal["auto"] = "auto"
    """Steps between two checkpoints; 0 writes only the last one. auto balances the cost of a checkpoint against the work that
    is lost with a machine (Young, 1974)."""
    preemption_hours: float = HOURS_BETWEEN_PREEMPTIONS
    """For auto: the mean time between two preemptions of a machine, in hours."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep checkpoints whose step is a multiple of this; 0 for no others."""
    remote: str | None = None
    """Object storage to which checkpoints and the model are copied during training, and where a run on an empty disk finds them:
    s3://bucket/run, gs://, az://, hf://buckets/…, file:///…. Each run needs its own. Needs pip install "fastft[cloud]"."""


@dataclass
class SamplesConfig:
    """Answers to fixed prompts while the model learns, in OUTPUT_DIR/samples.jsonl and on the report's page."""

    prompts: str | None = None
    """A file with a prompt on each line: its text, or a JSON object with prompt or messages. By default nothing is asked."""
    every: int = 200
    """Steps between two rounds of answers. There is also one before the first step, and one after the last."""
    max_new_tokens: int = 128
    """Longest answer, in tokens. Each token costs a forward pass over all prompts, without a cache."""


@dataclass
class TrainConfig:
    """A training run. Required: model, output_dir, and data or stages."""

    model: str
    """Directory (or Hub name) of a causal language model with its tokenizer."""
    output_dir: str
    """Directory for checkpoints, metrics and the trained model."""
    data: str | list[SourceConfig] | None = None
    """Conversations: a file that `fastft clean` wrote, or any JSON(L) with messages or ShareGPT conversations. In YAML also a
    list of files, each with path, weight (uses per epoch) and epochs."""
    stages: list[StageConfig] = field(default_factory=list)
    """In YAML: data sets that are trained on one after the other, each with data, epochs, max_steps, lr and schedule."""
    eval_data: str | None = None
    """Held-out conversations; their loss is measured every `eval_every` steps."""
    template: str | None = None
    """Chat template: a built-in name or a .jinja file; by default the tokenizer's own."""
    seq_len: int = 2048
    """Sequence length: tokens in a packed row. No conversation may be longer."""
    extend: Literal["none", "linear", "yarn"] = "none"
    """What to do if the model has fewer positions than seq_len: stop (none), or scale its rotary positions by position
    interpolation (linear) or YaRN. The exported config holds the scaling."""
    overlong: Literal["refuse", "drop", "split"] = "refuse"
    """What to do with conversations longer than seq_len: stop and say how many there are (refuse), leave them out and count
    them (drop), or split them between rounds."""
    epochs: int = 3
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, over which the schedule then runs. Stages have limits of their own."""
    global_batch_size: int = 32
    """Packed rows per optimizer step, over all ranks."""
    micro_batch_size: int = 1
    """Packed rows per rank in a forward pass."""
    seed: int = 0
    """Seed of the order of the data and of everything else that is random."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this one; 0 turns it off."""
    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2 in the loss, which keeps logits from drifting; PaLM used 1e-4."""
    max_bad_steps: int = 3
    """Steps whose loss or gradient is not a finite number are skipped; this many in a row end the run."""
    float8: bool = False
    """Matrix products of the blocks in 8-bit floats. Needs compile, Hopper GPUs or newer, and torchao:
    pip install "fastft[torchao]"."""
    gradient_checkpointing: Literal["none", "selective", "full", True, False] = "full"
    """What the backward pass computes again: nothing (none), all but attention and every second matrix product (selective), or
    whole blocks (full)."""
    attention: Literal["auto", "flash_attn", "varlen", "documents"] = "auto"
    """What computes attention within documents: the flash-attn package, PyTorch's variable-length kernel, or one call per
    document, which runs everywhere; auto takes the fastest that works here."""
    compile: bool = False
    """torch.compile each block."""
    resize_embeddings: bool = False
    """Add embeddings for tokens that have none, each the mean of the old ones; their number becomes a multiple of 64."""
    replicas: int = 1
    """Number of copies of the sharded model (HSDP). Parameters are gathered within a copy only, such as within a machine."""
    offload: bool = False
    """Keep weights, gradients and the optimizer's state in the memory of the CPU; the GPU holds one block at a time."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: bool = True
    """Continue from the newest complete checkpoint in OUTPUT_DIR; if false, refuse an OUTPUT_DIR with an earlier run."""
    allow_change: bool = False
    """Continue from a checkpoint although data or settings have changed; the changes are logged."""
    log_every: int = 1
    """Optimizer steps between two reports."""
    eval_every: int = 100
    """Optimizer steps between two measurements of the loss on `eval_data`."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    trackers: str = "tensorboard"
    """Trackers that also get the metrics, separated by commas: tensorboard, wandb, trackio; or none."""
    price_per_hour: float | None = None
    """Dollars per hour for all machines of the run together. With it, the cost so far is shown and recorded."""
    dry_run: bool = False
    """Show the plan and take two steps with its fullest rows, to measure peak memory and time; write nothing."""

    def __post_init__(self) -> None:
        if isinstance(self.gradient_checkpointing, bool):
            self.gradient_checkpointing = "full" if self.gradient_checkpointing else "none"
        for check in (
            _check_data, _check_numbers, _check_samples_and_checkpoints, _check_lora, _check_optimizer, _check_float8
        ):  # fmt: skip
            check(self)


def stages_of(config: TrainConfig) -> list[TrainConfig]:
    """The stages of a run, each as the configuration of a run of its own. A run without stages is its own only stage."""
    if not config.stages:
        return [config]
    found = []
    for stage in config.stages:
        lr = config.optimizer.lr if stage.lr is None else stage.lr
        found.append(
            replace(
                config,
                stages=[],
                data=stage.data,
                epochs=config.epochs if stage.epochs is None else stage.epochs,
                max_steps=stage.max_steps,
                optimizer=replace(config.optimizer, lr=lr),
                schedule=stage.schedule or config.schedule,
            )
        )
    return found


def sources_of(data: str | list[SourceConfig]) -> list[SourceConfig]:
    """The files of a run or a stage."""
    return [SourceConfig(data)] if isinstance(data, str) else data


def _check_data(config: TrainConfig) -> None:
    if (config.data is None) == (not config.stages):
        raise UserError("data: name the conversations with --data, or in stages, not both")
    for source in config.data if isinstance(config.data, list) else ():
        _require(0 < source.weight < math.inf, f"data: {source.path}: weight", source.weight, "above 0 and finite")
        _require(
            source.epochs is None or source.epochs >= 1, f"data: {source.path}: epochs", source.epochs, "1 or more"
        )


def _check_numbers(config: TrainConfig) -> None:
    for name in (
        "seq_len",
        "epochs",
        "global_batch_size",
        "micro_batch_size",
        "max_bad_steps",
        "log_every",
        "eval_every",
        "replicas",
    ):
        _require(getattr(config, name) >= 1, name, getattr(config, name), "1 or more")
    _require(config.max_steps is None or config.max_steps >= 1, "max_steps", config.max_steps, "1 or more")
    if config.stages and config.max_steps is not None:
        raise UserError("max_steps: a run of stages has no limit of its own; set max_steps in its stages")
    _require(0 <= config.seed < 2**32, "seed", config.seed, "between 0 and 2^32 - 1")
    for tracker in config.trackers.split(","):
        _require(tracker.strip() in TRACKERS, "trackers", repr(tracker.strip()), f"one of {', '.join(TRACKERS)}")
    price = config.price_per_hour
    _require(price is None or 0 <= price < math.inf, "price_per_hour", price, "0 or more and finite")


def _check_samples_and_checkpoints(config: TrainConfig) -> None:
    for name in ("every", "max_new_tokens"):
        _require(getattr(config.samples, name) >= 1, f"samples.{name}", getattr(config.samples, name), "1 or more")
    every, hours = config.checkpoint.every, config.checkpoint.preemption_hours
    _require(every == "auto" or every >= 0, "checkpoint.every", every, "0 or more")
    _require(0 < hours < math.inf, "checkpoint.preemption_hours", hours, "above 0 and finite")
    _require(config.checkpoint.keep_every >= 0, "checkpoint.keep_every", config.checkpoint.keep_every, "0 or more")
    _require(config.checkpoint.keep >= 1, "checkpoint.keep", config.checkpoint.keep, "1 or more")
    if config.checkpoint.remote is not None:
        try:
            check_address(config.checkpoint.remote)
        except UserError as error:
            raise UserError(f"checkpoint.remote: {error}") from None


def _check_lora(config: TrainConfig) -> None:
    lora = config.lora
    _require(lora.r >= 0, "lora.r", lora.r, "0 or more")
    _require(0 < lora.alpha < math.inf, "lora.alpha", lora.alpha, "above 0 and finite")
    _require(0 <= lora.dropout < 1, "lora.dropout", lora.dropout, "at least 0 and below 1")
    _require(lora.targets.strip(", ") != "", "lora.targets", repr(lora.targets), "a list of layers")
    if lora.quantize != "none" and not lora.r:
        raise UserError(f"lora.quantize: {lora.quantize} weights are frozen; give adapters a rank, say lora.r 16")
    if lora.r and config.resize_embeddings:
        raise UserError(
            "resize_embeddings: lora freezes the embeddings, so new ones would never be learned; use lora.r 0"
        )


def _check_optimizer(config: TrainConfig) -> None:
    schedule, optimizer = config.schedule, config.optimizer
    for name in ("warmup_ratio", "decay_ratio", "min_ratio"):
        _require(0 <= getattr(schedule, name) <= 1, f"schedule.{name}", getattr(schedule, name), "between 0 and 1")
    _require(0 < optimizer.lr < math.inf, "optimizer.lr", optimizer.lr, "above 0 and finite")
    _require(0 <= optimizer.weight_decay < math.inf, "optimizer.weight_decay", optimizer.weight_decay, "0 or more")
    _require(
        all(0 <= beta < 1 for beta in optimizer.betas),
        "optimizer.betas",
        optimizer.betas,
        "at least 0 and below 1",
    )
    for name in ("max_grad_norm", "z_loss"):
        _require(0 <= getattr(config, name) < math.inf, name, getattr(config, name), "0 or more and finite")
    if optimizer.name == "adamw_8bit" and optimizer.state_dtype != "float32":
        raise UserError("optimizer.state_dtype: adamw_8bit has moments of its own; leave it out, or use adamw")


def _check_float8(config: TrainConfig) -> None:
    if config.float8 and not config.compile:
        raise UserError("float8: without compile it is slower than bf16; add --compile true")
    tokens = config.seq_len * config.micro_batch_size  # over which the matrix product of the gradient sums
    if config.float8 and tokens % 16:
        raise UserError(f"float8: seq_len x micro_batch_size is {tokens}, and the kernels need a multiple of 16")


def _require(holds: bool, key: str, value, wanted: str) -> None:
    if not holds:
        raise UserError(f"{key}: {value} is not {wanted}")


def parse_config(argv: list[str]) -> TrainConfig:
    """Read the command line (and the YAML file it names). Raises UsageError with one line; `--help` exits."""
    return parse(argv, "fastft train", "Fine-tune a chat model.", TrainConfig, renamed=RENAMED, synonyms=SYNONYMS)[0]


def read_config(path: Path) -> TrainConfig:
    """Read what `save_config` wrote, in the last release, too: without a warning of keys that have other names now."""
    argv, keys = ["--config", str(path)], {"renamed": RENAMED, "synonyms": SYNONYMS}
    return parse(argv, "fastft train", "Fine-tune a chat model.", TrainConfig, **keys, warns=False)[0]


def save_config(config: TrainConfig, path: Path) -> None:
    """Write YAML that `--config` reads back."""
    import yaml

    values = asdict(config)
    values["optimizer"]["betas"] = list(values["optimizer"]["betas"])
    write_whole(path, yaml.safe_dump(values, sort_keys=False))
