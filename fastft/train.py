"""Fine-tune a chat model on conversations: the whole run, to be read from top to bottom.

    torchrun --nproc-per-node 8 -m fastft.train --config run.yaml --optimizer.lr 1e-5
    fastft train --model MODEL --data conversations.jsonl --output_dir runs/first        # one process

Started again with the same command, a run goes on from its newest complete checkpoint; a finished one exits at once. On
CPU the result is bit for bit that of an uninterrupted run. The loss of a step is the sum over its trained tokens by
their global number, so it does not depend on ranks, micro-batches or packing.
"""

import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from fastft import checkpoint
from fastft.attention import choose_attention
from fastft.card import model_card
from fastft.config import TrainConfig, parse_config, save_config, sources_of, stages_of
from fastft.data import (
    Batch,
    Course,
    Schedule,
    Step,
    TokenizedData,
    ahead,
    conversation_names,
    fit_to_window,
    mixed,
    rank_batches,
    tokenized,
)
from fastft.memory import out_of_memory_line
from fastft.metrics import Reporter, step_rows
from fastft.model import (
    TrainedModel,
    count_parameters,
    fit_config,
    load_config,
    model_fingerprint,
    prepare_model,
    prove_isolation,
)
from fastft.optim import SkippedSteps, build_optimizer, clip_gradients, learning_rate, update
from fastft.rehearsal import rehearse
from fastft.resume import find_starts, resume, run_identity
from fastft.run_directory import describe, read_run, write_facts
from fastft.run_report import refresh_page
from fastft.samples import Sampler
from fastft.template import ChatTemplate, load_template
from fastft.trackers import Trackers, tracker_names

SHOWN_NAMES = 10  # conversations in an error's one line; the rest goes to a file


def train(config: TrainConfig) -> Path | None:
    """Run to the end and return the directory of the exported model, None after a dry run.

    Raises ValueError for the user's mistakes.
    """
    started, device = time.time(), join_ranks()
    rank, world = dist.get_rank(), dist.get_world_size()
    say = (lambda line: print(line, file=sys.stderr, flush=True)) if rank == 0 else (lambda line: None)
    output_dir = Path(config.output_dir)
    if config.global_batch_size % (world * config.micro_batch_size):
        raise ValueError(
            f"global_batch_size {config.global_batch_size} is not a multiple of micro_batch_size {config.micro_batch_size} "
            f"x {world} processes"
        )
    trackers = tracker_names(config.trackers)

    # Data: the same tokens, plan and steps on every rank.
    source_config = load_config(config.model)
    template = load_template(config.model, config.template)
    model_config = fit_config(source_config, config, len(template.tokenizer))
    if model_config is not source_config:
        say(
            f"model: extended to {model_config.max_position_embeddings} positions, {model_config.vocab_size} embeddings"
        )
    stages = stages_of(config)
    course = Course([plan_stage(stage, template, say) for stage in stages])
    eval_data = load_data(config.eval_data, template, config, say) if config.eval_data else None
    sampler = Sampler(config, template)

    # Where an earlier start of this run left off.
    checkpoints = output_dir / "checkpoints"
    identity = run_identity(config, course, model_fingerprint(config.model, source_config))
    starts = [] if config.dry_run else find_starts(config, checkpoints, identity, say)
    first = starts[0][1]["step"] if starts else 0
    if first >= course.total and (output_dir / "model").is_dir():
        say(f"finished: step {first} of {course.total} is done; the model is in {output_dir / 'model'}")
        return output_dir / "model"

    # Model and optimiser.
    attention, why = choose_attention(config.attention, device)
    say(why)
    model = prepare_model(config, model_config, attention, device, say)
    body, head = count_parameters(model)
    prove_isolation(model, device)
    optimizer = build_optimizer(model, config)
    if config.dry_run:
        batches = partial(build_batches, course, config, device)
        take = lambda step: train_step(model, optimizer, step, batches(step), config, 1, config.optimizer.lr, device)  # noqa: E731
        return rehearse(take, course, config, device, say)
    start = resume(starts, model, optimizer, config, say)
    first, skipped = start["step"], SkippedSteps(**start["skipped"])
    facts = describe(config, template, course, eval_data, device, world)
    reporter = open_reporter(config, trackers, facts, first, course.total, started)
    sampler.go_on(output_dir, first)
    writer = checkpoint.Writer(checkpoints, config.checkpoint.keep, config.checkpoint.keep_every)
    dist.barrier()

    if first == 0 and sampler.prompts:
        sampler.ask(model, 0, device)

    # The loop. `pending` holds what the device computed but nobody has read yet: reading waits for the device. That a
    # step was left out is heard of there, too.
    pending: list[dict] = []
    began = time.perf_counter()
    steps = map(course.step, range(first + 1, course.total + 1))
    for number, (step, batches) in enumerate(ahead(steps, partial(build_batches, course, config, device)), first + 1):
        stage = course.stages[step.stage]
        lr = learning_rate(stages[step.stage], step.number, stage.total)
        numbers = train_step(model, optimizer, step, batches, config, number, lr, device)
        where = {"stage": step.stage + 1} if config.stages else {}
        pending.append({**numbers, "number": number, **where, "epoch": step_epoch(stage, step)})

        save_now = number == course.total or (config.checkpoint.every and number % config.checkpoint.every == 0)
        evaluate_now = eval_data is not None and (number % config.eval_every == 0 or number == course.total)
        ask_now = sampler.is_due(number, course.total)
        if number % config.log_every == 0 or save_now or evaluate_now or ask_now:
            rows = step_rows(pending, time.perf_counter() - began, model, (body, head), device)
            for row in rows:
                skipped.count(row)
                if reporter:
                    reporter.step(row)
                if skipped.in_a_row >= config.max_bad_steps:
                    if reporter:
                        reporter.flush()
                    give_up(row["step"], skipped.in_a_row, course, config)
            pending.clear()
            began = time.perf_counter()
        if evaluate_now:
            eval_loss = evaluate(model, eval_data, config, device)
            if reporter:
                reporter.evaluation({"step": number, "eval_loss": eval_loss})
        if ask_now:
            sampler.ask(model, number, device)
        if reporter and (save_now or evaluate_now or ask_now):
            reporter.flush()
            refresh_page(output_dir, say)
        if save_now:
            writer.save(number, model, optimizer, {"identity": identity, "skipped": asdict(skipped)})
        if save_now or evaluate_now or ask_now:
            began = time.perf_counter()

    writer.wait()
    if reporter:
        reporter.close()
    card = model_card(read_run(output_dir), course.total) if reporter else ""
    checkpoint.export(model, template, config.model, model_config, output_dir / "model", card, output_dir / "adapter")
    if reporter:
        refresh_page(output_dir, say)
    say(f"done: {course.total} steps; the model is in {output_dir / 'model'}")
    return output_dir / "model"


def train_step(
    model: TrainedModel,
    optimizer: torch.optim.Optimizer,
    step: Step,
    batches: list[Batch],
    config: TrainConfig,
    number: int,
    lr: float,
    device: torch.device,
) -> dict:
    """Optimiser step `number`, or none if its loss or gradient is no finite number. Returns its numbers; `measured` holds
    the loss, the z-loss and the norm of the gradient, the same on every rank, and is still on the device.
    """
    # Every rank knows every row: the global count is exact, and there is nothing to communicate or to wait for.
    conversations = [c for row in step.rows for c in row]
    trained = sum(int(step.data.trained[c][1:].sum()) for c in conversations)
    torch.manual_seed(
        hash_seed(config.seed, number, dist.get_rank())
    )  # dropout, where a model has it, survives a resume
    losses = accumulate_gradients(model, batches, trained, device)
    dist.all_reduce(losses)
    measured = torch.cat([losses, clip_gradients(model, config.max_grad_norm).to(device)[None]])
    update(optimizer, lr, measured.isfinite().all())
    lengths = [len(step.data.ids[c]) for c in conversations]
    tokens = sum(lengths)
    return {
        "measured": measured,
        "lr": lr,
        "tokens": tokens,
        "trained_tokens": trained,
        "padding_tokens": len(step.rows) * config.window - tokens,
        "squared_lengths": sum(length * length for length in lengths),
    }


def accumulate_gradients(model: TrainedModel, batches: list[Batch], trained: int, device: torch.device) -> torch.Tensor:
    """Forward and backward over this rank's share of a step with `trained` tokens in all.

    Returns its share of the loss and of the z-loss [2], fp32.
    """
    losses = torch.zeros(2, device=device)
    for batch in batches:
        loss, z_loss = model(**batch.to(device), scale=1 / trained)
        loss.backward()
        losses += torch.stack([loss.detach() - z_loss, z_loss])
    return losses


def build_batches(course: Course, config: TrainConfig, device: torch.device, step: Step) -> list[Batch]:
    """This rank's micro-batches of a step, where the device can fetch them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = rank_batches(step, rank, world, config.micro_batch_size, config.window, course.most_in_a_row)
    return [batch.pinned() if device.type == "cuda" else batch for batch in batches]


@torch.no_grad()
def evaluate(model: TrainedModel, data: TokenizedData, config: TrainConfig, device: torch.device) -> float:
    """Mean loss per trained token over the held-out conversations; collective."""
    rows = dist.get_world_size() * config.micro_batch_size
    course = Course([Schedule(data, config.window, config.seed, 1, rows, None)])
    total = torch.zeros((), device=device, dtype=torch.float64)
    model.eval()
    for number in range(1, course.total + 1):
        for batch in build_batches(course, config, device, course.step(number)):
            total += model(**batch.to(device))[0]
    model.train()
    model.reshard()
    dist.all_reduce(total)
    return float(total) / int(data.trained_counts.sum())


def give_up(last: int, count: int, course: Course, config: TrainConfig) -> None:
    """Raise ValueError for `count` bad steps in a row that ended with step `last`, naming their conversations."""
    first = last - count + 1
    names = []
    for step in map(course.step, range(first, last + 1)):
        names += conversation_names(step.data, [int(c) for row in step.rows for c in row])
    names = list(dict.fromkeys(names))
    more = ""
    if len(names) > SHOWN_NAMES:
        path = Path(config.output_dir) / "bad_conversations.txt"
        if dist.get_rank() == 0:
            path.write_text("".join(f"{name}\n" for name in names))
        more = f" and {len(names) - SHOWN_NAMES} more, all in {path}"
    raise ValueError(
        f"steps {first} to {last}: the loss or the gradient was not a finite number, so nothing was learned from them. "
        f"Lower optimizer.lr, or look at their conversations: {', '.join(names[:SHOWN_NAMES])}{more}"
    )


def plan_stage(stage: TrainConfig, template: ChatTemplate, say) -> Schedule:
    """The steps of one stage, from all its files."""
    sources = sources_of(stage.data)
    parts = [load_data(source.path, template, stage, say) for source in sources]
    data = mixed(parts, [source.weight for source in sources], [source.epochs for source in sources])
    schedule = Schedule(data, stage.window, stage.seed, stage.epochs, stage.global_batch_size, stage.max_steps)
    plan, world = schedule.describe(), dist.get_world_size()
    say(
        f"plan: {plan['rows']} rows of {stage.window} tokens (lower bound {plan['lower_bound']}), {plan['fill']:.1%} full; "
        f"{schedule.total} steps of {stage.global_batch_size} rows on {world} process{'es' if world > 1 else ''}"
    )
    return schedule


def load_data(path: str, template: ChatTemplate, config: TrainConfig, say) -> TokenizedData:
    """Tokens of `path`, made by the first process of each machine and shared by all of it."""
    failure = None
    split_to = config.window if config.overlong == "split" else None
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            progress = lambda done: say(f"tokenised {done} conversations") if done % 8192 == 0 else None  # noqa: E731
            tokenized(path, template, split_to, progress)
        except (ValueError, OSError) as error:
            failure = str(error)
    failures: list = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if any(failures):
        raise ValueError(next(f for f in failures if f))
    data = tokenized(path, template, split_to)
    kept, counts = fit_to_window(data, config.window, config.overlong, path)
    lost = f", {data.lost_rounds} rounds that no split could fit" if data.lost_rounds else ""
    say(
        f"data: {path}: {counts['conversations']} conversations, {kept.lengths.sum():,} tokens, "
        f"{kept.trained_counts.sum():,} trained; left out: {counts['overlong']} over the window, "
        f"{counts['nothing_to_train']} without an answer to learn{lost}; {data.merged_borders} borders where the answer's "
        "own tokens won"
    )
    for written in sorted(template.written_before_answers):
        say(f"note: the template writes {written!r} before some answers; it is trained with them")
    return kept


def open_reporter(
    config: TrainConfig, names: list[str], facts: dict, first: int, total: int, started: float
) -> Reporter | None:
    """The run's files and trackers, which the first process has; collective. Raises ValueError where one does not open."""
    reporter, failure, output_dir = None, [None], Path(config.output_dir)
    if dist.get_rank() == 0:
        try:
            save_config(config, output_dir / "config.yaml")
            run_id = write_facts(output_dir, facts)
            trackers = Trackers(names, output_dir, run_id, first, asdict(config))
            reporter = Reporter(output_dir, first, total, trackers, config.price_per_hour, started)
        except (ValueError, OSError) as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure)
    if failure[0]:
        raise ValueError(failure[0])
    return reporter


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
            if not config.dry_run:
                Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output_dir {config.output_dir}: {error.strerror}") from None
        try:
            train(config)
        except torch.OutOfMemoryError:
            raise ValueError(out_of_memory_line(config, dist.get_world_size())) from None
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
