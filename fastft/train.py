"""Fine-tune a chat model on conversations: the whole run, to be read from top to bottom.

    torchrun --nproc-per-node 8 -m fastft.train --config run.yaml --optimizer.lr 1e-5
    fastft train --model MODEL --data conversations.jsonl --output_dir runs/first        # one process

Started again with the same command, a run goes on from its newest complete checkpoint; a finished one exits at once. On
CPU the result is bit for bit that of an uninterrupted run. The loss of a step is the sum over its trained tokens by
their global number, so it does not depend on ranks, micro-batches or packing.
"""

import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from fastft import checkpoint
from fastft.attention import choose_attention
from fastft.config import TrainConfig, parse_config, save_config
from fastft.data import Schedule, Step, TokenizedData, fit_to_window, rank_batches, tokenized
from fastft.metrics import Reporter, peak_flops, training_flops
from fastft.model import (
    TrainedModel,
    count_parameters,
    fit_config,
    load_config,
    model_fingerprint,
    prepare_model,
    prove_isolation,
)
from fastft.template import ChatTemplate, load_template


def train(config: TrainConfig) -> Path:
    """Run to the end and return the directory of the exported model. Raises ValueError for the user's mistakes."""
    device = join_ranks()
    rank, world = dist.get_rank(), dist.get_world_size()
    say = (lambda line: print(line, file=sys.stderr, flush=True)) if rank == 0 else (lambda line: None)
    output_dir = Path(config.output_dir)
    if config.global_batch_size % (world * config.micro_batch_size):
        raise ValueError(
            f"global_batch_size {config.global_batch_size} is not a multiple of micro_batch_size {config.micro_batch_size} "
            f"x {world} processes"
        )

    # Data: the same tokens, plan and steps on every rank.
    source_config = load_config(config.model)
    template = load_template(config.model, config.template)
    model_config = fit_config(source_config, config, len(template.tokenizer))
    if model_config is not source_config:
        say(
            f"model: extended to {model_config.max_position_embeddings} positions, {model_config.vocab_size} embeddings"
        )
    data = load_data(config.data, template, config, say)
    eval_data = load_data(config.eval_data, template, config, say) if config.eval_data else None
    schedule = Schedule(data, config.window, config.seed, config.epochs, config.global_batch_size, config.max_steps)
    plan = schedule.describe()
    say(
        f"plan: {plan['rows']} rows of {config.window} tokens (lower bound {plan['lower_bound']}), {plan['fill']:.1%} full; "
        f"{schedule.total} steps of {config.global_batch_size} rows on {world} process{'es' if world > 1 else ''}"
    )

    # Where an earlier start of this run left off.
    checkpoints = output_dir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    identity = run_identity(config, data, model_fingerprint(config.model, source_config))
    starts = find_starts(config, checkpoints, identity, say)
    first = starts[0][1]["step"] if starts else 0
    if first >= schedule.total and (output_dir / "model").is_dir():
        say(f"finished: step {first} of {schedule.total} is done; the model is in {output_dir / 'model'}")
        return output_dir / "model"

    # Model and optimiser.
    attention, why = choose_attention(config.attention, device)
    say(why)
    model = prepare_model(config, model_config, attention, device, say)
    body, head = count_parameters(model)
    prove_isolation(model, device)
    optimizer = build_optimizer(model, config)
    first = resume(starts, model, optimizer, say)
    reporter = open_reporter(config, output_dir, first, schedule.total) if rank == 0 else None
    dist.barrier()

    # The loop. `pending` holds what the device computed but nobody has read yet: reading waits for the device.
    pending: list[dict] = []
    began = time.perf_counter()
    for number in range(first + 1, schedule.total + 1):
        step = schedule.step(number)
        numbers = train_step(
            model, optimizer, data, step, config, learning_rate(config, number, schedule.total), device
        )
        pending.append({**numbers, "number": number, "epoch": step_epoch(schedule, step)})

        save_now = number == schedule.total or (config.checkpoint.every and number % config.checkpoint.every == 0)
        evaluate_now = eval_data is not None and (number % config.eval_every == 0 or number == schedule.total)
        if number % config.log_every == 0 or save_now or evaluate_now:
            rows = report_rows(pending, time.perf_counter() - began, model, (body, head), device)
            for row in rows:
                require_finite(row)
                if reporter:
                    reporter.step(row)
            pending.clear()
            began = time.perf_counter()
        if evaluate_now:
            eval_loss = evaluate(model, eval_data, config, device)
            if reporter:
                reporter.evaluation({"step": number, "eval_loss": eval_loss})
            began = time.perf_counter()
        if save_now:
            if reporter:
                reporter.flush()
            checkpoint.save(checkpoints, number, model, optimizer, {"identity": identity})
            if rank == 0:
                checkpoint.prune(checkpoints, config.checkpoint.keep)
            began = time.perf_counter()

    if reporter:
        reporter.close()
    checkpoint.export(model, template, config.model, model_config, output_dir / "model")
    say(f"done: {schedule.total} steps; the model is in {output_dir / 'model'}")
    return output_dir / "model"


def train_step(
    model: TrainedModel,
    optimizer: torch.optim.Optimizer,
    data: TokenizedData,
    step: Step,
    config: TrainConfig,
    lr: float,
    device: torch.device,
) -> dict:
    """One optimiser step. Returns its numbers; `loss` is this rank's share and, like `grad_norm`, still on the device."""
    # Every rank knows every row, so the global count needs no communication.
    conversations = [c for row in step.rows for c in row]
    trained = sum(int(data.trained[c][1:].sum()) for c in conversations)
    loss = accumulate_gradients(model, data, step, trained, config, device)
    grad_norm = clip_gradients(model, config.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    lengths = [len(data.ids[c]) for c in conversations]
    tokens = sum(lengths)
    return {
        "loss": loss,
        "grad_norm": grad_norm,
        "lr": lr,
        "tokens": tokens,
        "trained_tokens": trained,
        "padding_tokens": len(step.rows) * config.window - tokens,
        "squared_lengths": sum(length * length for length in lengths),
    }


def accumulate_gradients(
    model: TrainedModel, data: TokenizedData, step: Step, trained: int, config: TrainConfig, device: torch.device
) -> torch.Tensor:
    """Forward and backward over this rank's share of a step with `trained` tokens in all. Returns its share of the loss."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(hash_seed(config.seed, step.number, rank))  # dropout, where a model has it, survives a resume
    loss = torch.zeros((), device=device)
    for batch in rank_batches(data, step, rank, world, config.micro_batch_size, config.window):
        part = model(**batch.to(device)) / trained
        part.backward()
        loss += part.detach()
    return loss


def clip_gradients(model: TrainedModel, max_norm: float) -> torch.Tensor:
    """Scale the gradients of all shards to a global norm of at most `max_norm` (0: only measure). Returns the norm."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    return norm.full_tensor()


def learning_rate(config: TrainConfig, number: int, total: int) -> float:
    """Of step `number` in 1..total: linear warm-up to the peak, then cosine or linear towards 0 (which step total + 1 would
    reach: no step is wasted), or constant.
    """
    warmup = math.ceil(config.schedule.warmup_ratio * total)
    if number <= warmup:
        return config.optimizer.lr * number / warmup
    done = (number - warmup) / (total + 1 - warmup)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return config.optimizer.lr * factor[config.schedule.name]


def build_optimizer(model: TrainedModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.optimizer.lr, betas=config.optimizer.betas, fused=True
    )


@torch.no_grad()
def evaluate(model: TrainedModel, data: TokenizedData, config: TrainConfig, device: torch.device) -> float:
    """Mean loss per trained token over the held-out conversations; collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    schedule = Schedule(data, config.window, config.seed, 1, world * config.micro_batch_size, None)
    total = torch.zeros((), device=device, dtype=torch.float64)
    model.eval()
    for number in range(1, schedule.total + 1):
        for batch in rank_batches(data, schedule.step(number), rank, world, config.micro_batch_size, config.window):
            total += model(**batch.to(device))
    model.train()
    model.reshard()
    dist.all_reduce(total)
    return float(total) / int(data.trained_counts.sum())


def report_rows(
    pending: list[dict], seconds: float, model: TrainedModel, parameters: tuple[int, int], device
) -> list[dict]:
    """The rows of metrics.jsonl for the steps since the last report. Here the host waits for the device, and the ranks
    for each other: once for all of them.
    """
    losses = torch.stack([p["loss"] for p in pending])
    dist.all_reduce(losses)
    norms = torch.stack([p["grad_norm"] for p in pending]).tolist()
    config = model.causal_lm.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    step_time = seconds / len(pending)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    rows = []
    for p, loss, norm in zip(pending, losses.tolist(), norms):
        flops = training_flops(
            p["tokens"], p["trained_tokens"], p["squared_lengths"], *parameters, config.num_hidden_layers, width
        )
        rows.append(
            {
                "step": p["number"],
                "epoch": p["epoch"],
                "loss": loss,
                "lr": p["lr"],
                "grad_norm": norm,
                "tokens": p["tokens"],
                "trained_tokens": p["trained_tokens"],
                "padding_tokens": p["padding_tokens"],
                "tokens_per_s": p["tokens"] / step_time,
                "step_time_s": step_time,
                "mfu": flops / step_time / (peak * dist.get_world_size()) if peak else None,
            }
        )
    return rows


def require_finite(row: dict) -> None:
    """Raise ValueError before a step that went wrong can be saved."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
            raise ValueError(
                f"step {row['step']}: the {name} is {row[name]}. Nothing was saved since; lower optimizer.lr or look at the data"
            )


def load_data(path: str, template: ChatTemplate, config: TrainConfig, say) -> TokenizedData:
    """Tokens of `path`, made by the first process of each machine and shared by all of it."""
    failure = None
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            tokenized(
                path,
                template,
                progress=lambda done: say(f"tokenised {done} conversations") if done % 8192 == 0 else None,
            )
        except (ValueError, OSError) as error:
            failure = str(error)
    failures: list = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if any(failures):
        raise ValueError(next(f for f in failures if f))
    data = tokenized(path, template)
    kept, counts = fit_to_window(data, config.window, config.overlong, path)
    say(
        f"data: {path}: {counts['conversations']} conversations, {kept.lengths.sum():,} tokens, "
        f"{kept.trained_counts.sum():,} trained; left out: {counts['overlong']} over the window, "
        f"{counts['nothing_to_train']} without an answer to learn; {data.merged_borders} borders where the answer's own "
        "tokens won"
    )
    for written in sorted(template.written_before_answers):
        say(f"note: the template writes {written!r} before some answers; it is trained with them")
    return kept


def find_starts(config: TrainConfig, checkpoints: Path, identity: dict, say) -> list[tuple[Path, dict]]:
    """Checkpoints to go on from, the newest first, as rank 0 sees them. Raises ValueError when they are another run's."""
    found = [checkpoint.complete(checkpoints, say) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    starts, model = found[0], Path(config.output_dir) / "model"
    if not starts and model.exists():
        raise ValueError(
            f"{model}: exists and is not this run's; choose another --output_dir, it would be written over"
        )
    if not starts:
        return []
    if not config.resume:
        raise ValueError(f"{config.output_dir}: holds an earlier run; choose another --output_dir or remove it")
    earlier = starts[0][1]["identity"]
    changed = [
        f"{key} was {earlier.get(key)!r} and is {value!r}"
        for key, value in identity.items()
        if earlier.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"{config.output_dir}: its checkpoints belong to another run ({'; '.join(changed)}); "
            "use another --output_dir, or the settings of that run"
        )
    return starts


def resume(starts: list[tuple[Path, dict]], model: TrainedModel, optimizer: torch.optim.Optimizer, say) -> int:
    """Load the newest checkpoint that can be read; return its step, 0 without checkpoints."""
    for path, meta in starts:
        try:
            checkpoint.load(path, model, optimizer)
        except (Exception, CheckpointException) as error:  # damaged in a way that its sizes do not show
            say(f"{path}: passed over: cannot be read ({type(error).__name__})")
            continue
        say(f"resumed: step {meta['step']} from {path}")
        return meta["step"]
    if starts:
        raise ValueError(
            f"{starts[0][0].parent}: none of its {len(starts)} checkpoints can be read; remove them to start again"
        )
    return 0


def run_identity(config: TrainConfig, data: TokenizedData, model: str) -> dict:
    """What must not change under a run that is resumed, by name. Paths may move; their contents may not."""
    values = asdict(config)
    same = (
        "window",
        "overlong",
        "extend",
        "resize_embeddings",
        "lora",
        "epochs",
        "max_steps",
        "global_batch_size",
        "seed",
        "max_grad_norm",
        "schedule",
        "optimizer",
    )
    identity = {key: values[key] for key in same}
    identity["optimizer"]["betas"] = list(identity["optimizer"]["betas"])
    return {**identity, "model": model, "data_and_template": data.fingerprint}


def open_reporter(config: TrainConfig, output_dir: Path, first: int, total: int) -> Reporter:
    save_config(config, output_dir / "config.yaml")
    return Reporter(output_dir, first, total)


def step_epoch(schedule: Schedule, step: Step) -> float:
    """Epochs done after this step, as a fraction."""
    start, end = schedule.starts[step.epoch], schedule.starts[step.epoch + 1]
    return step.epoch + (step.number - start) / (end - start)


def hash_seed(seed: int, number: int, rank: int) -> int:
    """One seed for each step and rank."""
    return ((seed * 1_000_003 + number) * 1_000_003 + rank) % 2**63


def join_ranks() -> torch.device:
    """Join the process group (torchrun's, or one of this process alone) and return this rank's device."""
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def first_to_fail() -> bool:
    """True on the rank that meets an error first: the others have the same one, or are its consequence."""
    if not dist.is_initialized():
        return int(os.environ.get("RANK", 0)) == 0
    return dist.distributed_c10d._get_default_store().add("fastft/failures", 1) == 1


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    try:
        config = parse_config(sys.argv[1:] if argv is None else argv)
        try:
            Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output_dir {config.output_dir}: {error.strerror}") from None
        train(config)
    except (ValueError, OSError) as error:
        if first_to_fail():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    from fastft.cli import leave

    leave(main())
