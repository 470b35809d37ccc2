"""The one configuration of a training run: a YAML file, overridden on the command line, saved beside the run.

    torchrun --nproc-per-node 8 -m fastft.train --config run.yaml --optimizer.lr 1e-5

Every key is a field of `TrainConfig`; nested ones are dotted on the command line. An unknown key or a value of the wrong
type is one line that names the key and the nearest valid one.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from fastft.common.command_line import parse
from fastft.errors import UserError

RENAMED = {"window": "seq_len"}  # keys of the last release: they work until the next, with a warning
SYNONYMS = {  # what others call our keys
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
"""That a node is kept, assumed where nothing is known: the geometric mean of nine recorded traces of launched instances.

Hours between two preemptions of a node: AWS V100 x 1, April 2023: 1.4, 1.8, 2.3, 3.2; AWS CPU, April 2023: 0.8, 2.0, 5.3;
GCP CPU, April 2023: 14.5 (skypilot-org/spot-traces); GCP A100 x 1, December 2021: 10.1 (uclasystem/bamboo). Little hangs on
it: where the truth is four times as long or a quarter, saves and lost work together cost 25 % more than they must.
"""


@dataclass
class OptimizerConfig:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps the moments in 8 bits: 2 bytes a parameter instead of 8. Needs torchao: pip install "fastft[torchao]"."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of adamw's moments between two steps; bfloat16 takes 4 bytes a parameter instead of 8 (torch >= 2.13 on GPUs)."""
    lr: float = 2e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Applied to matrices, embeddings among them, never to norms and biases."""
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass
class ScheduleConfig:
    """Learning rate over the run, as a function of the step alone."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Its curriculum after the warm-up; wsd (warm-up, stable, decay) keeps the peak until `decay_ratio` of the steps is left."""
    warmup_ratio: float = 0.03
    """Share of all steps over which the learning rate rises linearly from 0."""
    decay_ratio: float = 0.2
    """Share of all steps over which wsd decays, as 1 - sqrt (Hägele et al., 2024)."""
    min_ratio: float = 0.0
    """Where the decay ends, as a share of the peak."""


@dataclass
class LoraConfig:
    """Low-rank adapters over frozen weights (Hu et al., 2021), over 4-bit ones as QLoRA (Dettmers et al., 2023).

    Needs peft: pip install "fastft[lora]". The adapter is exported to OUTPUT_DIR/adapter, and merged into OUTPUT_DIR/model.
    """

    r: int = 0
    """Rank of the adapters; 0 trains the whole model. Adapters want about ten times its optimizer.lr."""
    alpha: float = 32.0
    """What an adapter adds is scaled by alpha / r."""
    dropout: float = 0.0
    """On the adapters' input."""
    targets: str = "all-linear"
    """Linear layers that get an adapter, by their last name, separated by commas; by default all but the head."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4 keeps the blocks' frozen matrices in 4 bits, whole on every process; needs bitsandbytes."""


@dataclass
class SourceConfig:
    """A file of conversations in a mixture."""

    path: str
    weight: float = 1.0
    """Times that a conversation comes in an epoch; of 2.3, three in ten come a third time, others in every epoch. What is left
    of a conversation adds up over the epochs, rounded up."""
    epochs: int | None = None
    """It takes part in so many epochs, the first; by default in all."""


@dataclass
class StageConfig:
    """A part of a run with data of its own; epochs, lr and schedule are the run's where it says nothing."""

    data: str | list[SourceConfig]
    epochs: int | None = None
    max_steps: int | None = None
    lr: float | None = None
    schedule: ScheduleConfig | None = None


@dataclass
class CheckpointConfig:
    """Checkpoints in OUTPUT_DIR/checkpoints; one is always written at the end."""

    every: int | Literal["auto"] = "auto"
    """Steps between two checkpoints; 0 writes only the last. auto weighs what one costs against the work that a lost machine
    takes with it (Young, 1974)."""
    preemption_hours: float = HOURS_BETWEEN_PREEMPTIONS
    """For auto: mean time that a machine is kept."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Keep those whose step is a multiple of this, too; 0: none."""
    remote: str | None = None
    """Address that checkpoints and the model are copied to while training goes on, and where a run on an empty disk finds
    them: s3://bucket/run, gs://, az://, hf://buckets/…, file:///…. One for each run. Needs pip install "fastft[cloud]"."""


@dataclass
class SamplesConfig:
    """Answers to fixed prompts while the model learns, in OUTPUT_DIR/samples.jsonl and on the report's page."""

    prompts: str | None = None
    """A file with a prompt a line: its text, or a JSON object with prompt or messages. By default nothing is asked."""
    every: int = 200
    """Steps between two times; they are also asked before the first step and after the last."""
    max_new_tokens: int = 128
    """Length of an answer. Each token costs a forward pass over all prompts, without a cache."""


@dataclass
class TrainConfig:
    """A training run. Required: model, output_dir, and data or stages."""

    model: str
    """Directory (or Hub name) of a causal language model with its tokenizer."""
    output_dir: str
    """Where checkpoints, metrics and the trained model go."""
    data: str | list[SourceConfig] | None = None
    """Conversations: a file that `fastft clean` wrote, or any JSON(L) with messages or ShareGPT conversations. In YAML also a
    list of files, each with path, weight (times an epoch) and epochs."""
    stages: list[StageConfig] = field(default_factory=list)
    """In YAML: sets that are trained on one after the other, each with data, epochs, max_steps, lr and schedule."""
    eval_data: str | None = None
    """Held-out conversations; their loss is measured every `eval_every` steps."""
    template: str | None = None
    """Chat template: a built-in name or a .jinja file; by default the tokenizer's own."""
    seq_len: int = 2048
    """Tokens in a packed row; no conversation may be longer."""
    extend: Literal["none", "linear", "yarn"] = "none"
    """What to do with a window above the model's positions: stop, or scale its rotary positions by position interpolation
    (linear) or YaRN. The exported config holds the scaling."""
    overlong: Literal["refuse", "drop", "split"] = "refuse"
    """What to do with conversations longer than the window: stop with their number, leave them out and count them, or split
    them at whole rounds."""
    epochs: int = 3
    max_steps: int | None = None
    """Stop after this many optimiser steps; the schedule is laid over them. Stages have limits of their own."""
    global_batch_size: int = 32
    """Packed rows per optimiser step, over all ranks."""
    micro_batch_size: int = 1
    """Packed rows per rank and forward."""
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns it off."""
    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2 in the loss, which keeps logits from drifting; PaLM took 1e-4."""
    max_bad_steps: int = 3
    """A step whose loss or gradient is no finite number is left out; this many in a row end the run."""
    float8: bool = False
    """Matrix products of the blocks in 8-bit floats: Hopper GPUs or newer, torchao (pip install "fastft[torchao]"), compile."""
    gradient_checkpointing: Literal["none", "selective", "full", True, False] = "full"
    """What the backward pass computes again: nothing, all but attention and every second matrix product, or whole blocks."""
    attention: Literal["auto", "flash_attn", "varlen", "documents"] = "auto"
    compile: bool = False
    """torch.compile each block."""
    resize_embeddings: bool = False
    """Give tokens that the model has no embedding for a new one, the mean of the old; the rows become a multiple of 64."""
    replicas: int = 1
    """Copies of the sharded model (HSDP): parameters are gathered within a copy only, say within a machine."""
    offload: bool = False
    """Keep weights, gradients and optimiser in the memory of the CPU; the GPU holds one block at a time."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: bool = True
    """Go on from the newest complete checkpoint in OUTPUT_DIR; false refuses to write over an earlier run."""
    allow_change: bool = False
    """Go on from a checkpoint although data or settings are not what they were; what changed is said."""
    log_every: int = 1
    """Optimiser steps between two reports."""
    eval_every: int = 100
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    trackers: str = "tensorboard"
    """Where curves go besides metrics.jsonl, separated by commas: tensorboard, wandb, trackio; none for nowhere."""
    price_per_hour: float | None = None
    """Of all machines of the run together; what it has cost so far is then shown and kept."""
    dry_run: bool = False
    """Show the plan and take two steps with its fullest rows, for the largest memory and the time; write nothing."""

    def __post_init__(self) -> None:
        if (self.data is None) == (not self.stages):
            raise UserError("data: name the conversations with --data, or in stages, not both")
        if isinstance(self.gradient_checkpointing, bool):
            self.gradient_checkpointing = "full" if self.gradient_checkpointing else "none"
        for source in self.data if isinstance(self.data, list) else ():
            _require(0 < source.weight < math.inf, f"data: {source.path}: weight", source.weight, "above 0 and finite")
            _require(
                source.epochs is None or source.epochs >= 1, f"data: {source.path}: epochs", source.epochs, "1 or more"
            )
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
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "1 or more")
        if self.stages and self.max_steps is not None:
            raise UserError("max_steps: a run of stages has no limit of its own; say max_steps in its stages")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "between 0 and 2^32 - 1")
        for tracker in self.trackers.split(","):
            _require(tracker.strip() in TRACKERS, "trackers", repr(tracker.strip()), f"one of {', '.join(TRACKERS)}")
        price = self.price_per_hour
        _require(price is None or 0 <= price < math.inf, "price_per_hour", price, "0 or more and finite")
        for name in ("every", "max_new_tokens"):
            _require(getattr(self.samples, name) >= 1, f"samples.{name}", getattr(self.samples, name), "1 or more")
        every, hours = self.checkpoint.every, self.checkpoint.preemption_hours
        _require(every == "auto" or every >= 0, "checkpoint.every", every, "0 or more")
        _require(0 < hours < math.inf, "checkpoint.preemption_hours", hours, "above 0 and finite")
        _require(self.checkpoint.keep_every >= 0, "checkpoint.keep_every", self.checkpoint.keep_every, "0 or more")
        _require(self.checkpoint.keep >= 1, "checkpoint.keep", self.checkpoint.keep, "1 or more")
        lora = self.lora
        _require(lora.r >= 0, "lora.r", lora.r, "0 or more")
        _require(0 < lora.alpha < math.inf, "lora.alpha", lora.alpha, "above 0 and finite")
        _require(0 <= lora.dropout < 1, "lora.dropout", lora.dropout, "from 0 up to, not with, 1")
        _require(lora.targets.strip(", ") != "", "lora.targets", repr(lora.targets), "a list of layers")
        if lora.quantize != "none" and not lora.r:
            raise UserError(f"lora.quantize: {lora.quantize} weights are frozen; give adapters a rank, say lora.r 16")
        if lora.r and self.resize_embeddings:
            raise UserError("resize_embeddings: lora freezes the embeddings, new ones would never be learned; lora.r 0")
        schedule, optimizer = self.schedule, self.optimizer
        for name in ("warmup_ratio", "decay_ratio", "min_ratio"):
            _require(0 <= getattr(schedule, name) <= 1, f"schedule.{name}", getattr(schedule, name), "between 0 and 1")
        _require(0 < optimizer.lr < math.inf, "optimizer.lr", optimizer.lr, "above 0 and finite")
        _require(0 <= optimizer.weight_decay < math.inf, "optimizer.weight_decay", optimizer.weight_decay, "0 or more")
        _require(
            all(0 <= beta < 1 for beta in optimizer.betas),
            "optimizer.betas",
            optimizer.betas,
            "from 0 up to, not with, 1",
        )
        for name in ("max_grad_norm", "z_loss"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more and finite")
        if optimizer.name == "adamw_8bit" and optimizer.state_dtype != "float32":
            raise UserError("optimizer.state_dtype: adamw_8bit has moments of its own; leave it out, or use adamw")
        if self.float8 and not self.compile:
            raise UserError("float8: without compile it is slower than bf16; add --compile true")
        if (
            self.float8 and (tokens := self.seq_len * self.micro_batch_size) % 16
        ):  # the gradient's product sums over tokens
            raise UserError(f"float8: window x micro_batch_size is {tokens}, the kernels need a multiple of 16")


def stages_of(config: TrainConfig) -> list[TrainConfig]:
    """The run's stages, each as the configuration of a run of its own; a run without stages is one."""
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
    return [SourceConfig(data)] if isinstance(data, str) else data


def _require(holds: bool, key: str, value, wanted: str) -> None:
    if not holds:
        raise UserError(f"{key}: {value} is not {wanted}")


def parse_config(argv: list[str], prog: str = "fastft train") -> TrainConfig:
    """Read the command line (and the YAML file it names). Raises UsageError with one line; `--help` exits."""
    return parse(argv, prog, "Fine-tune a chat model.", TrainConfig, renamed=RENAMED, synonyms=SYNONYMS)[0]


def save_config(config: TrainConfig, path) -> None:
    """Write YAML that `--config` reads back."""
    import yaml

    values = asdict(config)
    values["optimizer"]["betas"] = list(values["optimizer"]["betas"])
    with open(path, "w") as out:
        yaml.safe_dump(values, out, sort_keys=False)
