"""Fine-tune a chat model on conversations: the whole run, to be read from top to bottom.

    torchrun --nproc-per-node 8 -m fastft.train --config run.yaml --optimizer.lr 1e-5
    fastft train --model MODEL --data conversations.jsonl --output_dir runs/first        # one process

Started again with the same command, a run goes on from its newest complete checkpoint; a finished one exits at once. On
CPU the result is bit for bit that of an uninterrupted run. Asked to leave (SIGTERM, a cloud's notice) it saves and exits
with code 75. The loss of a step is the sum over its trained tokens by their global number, so it does not depend on ranks,
micro-batches or packing.
"""

import logging
import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist

from fastft.common.distributed import (
    SET_UP_LIMIT,
    STEP_LIMIT,
    everywhere,
    first_to_fail,
    join_ranks,
    limit_waiting,
    local_rank,
    on_first,
)
from fastft.config import TrainConfig, parse_config, save_config, stages_of
from fastft.cost.flops import attention_windows, matrix_flops, seen_squares
from fastft.cost.memory import out_of_memory_line
from fastft.data.batch import Batch, ahead, rank_batches
from fastft.data.dataset import TokenizedData, conversation_names, load_data
from fastft.data.step_plan import Curriculum, Step, StepPlan, plan_stage
from fastft.data.template.chat_template import load_template
from fastft.errors import UserError
from fastft.model import huggingface as hugging_face
from fastft.model.attention import choose_attention
from fastft.model.build import TrainedModel, prepare_model
from fastft.model.isolation import prove_isolation
from fastft.model.pretrained import fit_config, load_config, model_fingerprint
from fastft.train.checkpoint import local as checkpoint
from fastft.train.checkpoint.remote import Uploader, upload_model
from fastft.train.checkpoint.resume import find_starts, finished_model, open_store, resume, run_identity, take_lease
from fastft.train.checkpoint.save_interval import SaveInterval
from fastft.train.dry_run import dry_run_steps
from fastft.train.metrics import Reporter, step_rows
from fastft.train.optim import SkippedSteps, build_optimizer, clip_gradients, learning_rate, update
from fastft.train.preemption import notices
from fastft.train.preemption import stop as stopping
from fastft.train.preemption.stop import Preempted, Stopping, leave_early
from fastft.train.report.card import model_card
from fastft.train.report.page import refresh_page
from fastft.train.report.run_dir import describe, read_run, write_facts
from fastft.train.samples import Sampler
from fastft.train.startup import Startup
from fastft.train.trackers import Trackers, tracker_names

logger = logging.getLogger(__name__)

SHOWN_NAMES = 10  # conversations in an error's one line; the rest goes to a file


def train(config: TrainConfig) -> Path | None:
    """A run with its lease on the storage, which ends with it; see `run_to_the_end`."""
    with ExitStack() as at_exit:
        return run_to_the_end(config, at_exit)


def run_to_the_end(config: TrainConfig, at_exit: ExitStack) -> Path | None:
    """Run to the end and return the directory of the exported model, None after a dry run.

    Raises UserError for the user's mistakes, Preempted when it was asked to leave.
    """
    mark = None if local_rank() or config.dry_run else Path(config.output_dir) / stopping.MARK
    started, device, stop = time.time(), join_ranks(), Stopping(mark)
    at_exit.callback(stop.forget)
    startup = Startup()
    rank, world = dist.get_rank(), dist.get_world_size()
    output_dir = Path(config.output_dir)
    if config.global_batch_size % (world * config.micro_batch_size):
        raise UserError(
            f"global_batch_size {config.global_batch_size} is not a multiple of micro_batch_size {config.micro_batch_size} "
            f"x {world} processes"
        )
    trackers = tracker_names(config.trackers)

    # Data: the same tokens, plan and steps on every rank.
    source_config = load_config(config.model)
    template = load_template(config.model, config.template)
    model_config = fit_config(source_config, config, len(template.tokenizer))
    if model_config is not source_config:
        logger.info(
            f"model: extended to {model_config.max_position_embeddings} positions, {model_config.vocab_size} embeddings"
        )
    place = Path(at_exit.enter_context(TemporaryDirectory())) if config.dry_run else output_dir
    files = hugging_face.prepare(config, model_config, template, place / "model")
    stages = stages_of(config)
    curriculum = Curriculum([plan_stage(stage, template) for stage in stages])
    eval_data = load_data(config.eval_data, template, config) if config.eval_data else None
    sampler = Sampler(config, template)

    startup.done("data")

    # Where an earlier start of this run left off.
    identity, starts = run_identity(config, curriculum, model_fingerprint(config.model, source_config)), []
    if not config.dry_run:
        disk = checkpoint.Disk(output_dir / "checkpoints")
        store = open_store(config.checkpoint.remote, disk)
        finished = (
            finished_model(output_dir, store, identity, curriculum.total, bool(config.lora.r))
            if config.resume
            else None
        )
        if finished:
            logger.info(f"finished: step {curriculum.total} of {curriculum.total} is done; the model is in {finished}")
            return output_dir / "model"
        lease = take_lease(store, at_exit)
        starts = find_starts(config, disk, store, identity)
        if starts and (done := starts[0].meta["step"]) > curriculum.total:
            raise UserError(
                f"step {done} is done, and these settings end with step {curriculum.total}: raise max_steps or epochs, or have that "
                "step's model from fastft export"
            )

    startup.done("checkpoints found")

    # Model and optimiser.
    attention, why = choose_attention(config.attention, device)
    logger.info(why)
    model = prepare_model(config, model_config, attention, device, resumed=bool(starts))
    matrices = matrix_flops(model)
    optimizer = build_optimizer(model, config)
    if config.dry_run:
        prove_isolation(model, device)
        batches = partial(build_batches, curriculum, config, device)
        take = lambda step: train_step(model, optimizer, step, batches(step), config, 1, config.optimizer.lr, device)  # noqa: E731
        return dry_run_steps(take, curriculum, config, device)
    startup.done("model")
    start = resume(starts, disk, store, model, optimizer, config)
    startup.done("checkpoint")
    prove_isolation(model, device)
    first, skipped = start["step"], SkippedSteps(**start["skipped"])
    facts = describe(config, template, curriculum, eval_data, device, world)
    reporter = open_reporter(config, trackers, facts, first, curriculum.total, started)
    sampler.go_on(output_dir, first)
    retention = config.checkpoint.keep, config.checkpoint.keep_every
    uploader = Uploader(store, lease, disk.holders, *retention) if store else None
    writer = checkpoint.Writer(disk, *retention, uploader)
    save_interval = SaveInterval(config.checkpoint, len(disk.holders), writer)
    if disk.is_holder:
        notices.watch(stop)
    dist.barrier()

    if first == 0 and sampler.prompts:
        sampler.ask(model, 0, device)

    # The loop. `pending` holds what the device computed but nobody has read yet: reading waits for the device. That a
    # step was left out is heard of there, too.
    pending: list[dict] = []
    startup.done("files")
    began = loop_began = time.perf_counter()
    steps = map(curriculum.step, range(first + 1, curriculum.total + 1))
    with stop.between_steps(first):
        for number, (step, batches) in enumerate(
            ahead(steps, partial(build_batches, curriculum, config, device)), first + 1
        ):
            stage, last = curriculum.stages[step.stage], number == curriculum.total
            lr = learning_rate(stages[step.stage], step.number, stage.total)
            numbers = train_step(model, optimizer, step, batches, config, number, lr, device)
            where = {"stage": step.stage + 1} if config.stages else {}
            pending.append({**numbers, "number": number, **where, "epoch": step_epoch(stage, step)})

            stop_now, save_agreed = stop.agreed(number, rank == 0 and save_interval.wants_one())
            save_now = last or stop_now or save_agreed or save_interval.is_due(number)
            evaluate_now = eval_data is not None and (number % config.eval_every == 0 or last) and not stop_now
            ask_now = sampler.is_due(number, curriculum.total) and not stop_now
            if number % config.log_every == 0 or save_now or evaluate_now or ask_now:
                rows = step_rows(pending, time.perf_counter() - began, model, matrices, device)
                for row in rows:
                    skipped.count(row)
                    if reporter:
                        reporter.step(row)
                    if skipped.in_a_row >= config.max_bad_steps:
                        if reporter:
                            reporter.flush()
                        give_up(row["step"], skipped.in_a_row, curriculum, config)
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
                refresh_page(output_dir)
            if save_now:
                writer.save(number, model, optimizer, {"identity": identity, "skipped": asdict(skipped)})
                save_interval.saved()
            if stop_now:
                leave_early(number, stop, writer)
            if save_now or evaluate_now or ask_now:
                began = time.perf_counter()
            if number == first + 1:  # that compiled and warmed up: from here on, who is late is gone
                startup.done("step")
                logger.info(str(startup))
                limit_waiting(STEP_LIMIT, writer.patient_groups)

        looped_s = time.perf_counter() - loop_began
        limit_waiting(SET_UP_LIMIT)
        writer.wait()
        if stop.agreed(curriculum.total, False, last=True)[0]:  # asked while the last step was evaluated or saved
            leave_early(curriculum.total, stop, writer)

    if writer.saves:
        logger.info(
            f"checkpoints: {writer.saves} saved; training waited {writer.blocked_s:.2f} s for them, "
            f"{writer.blocked_s / looped_s:.1%} of its time"
        )
    with hugging_face.advising(saved_line(disk, curriculum.total)):
        try:
            if reporter:
                reporter.close()
            card = model_card(read_run(output_dir), curriculum.total) if reporter else ""
            hugging_face.export(model, files, output_dir / "model", card, output_dir / "adapter")
        except Exception:
            if uploader:
                uploader.finish()  # the last checkpoint is all that there is of the run
            raise
    if reporter:
        refresh_page(output_dir)
    if uploader:
        uploader.finish()
        marks = {"step": curriculum.total, "world_size": world, "machines": len(disk.holders), "identity": identity}
        on_first(lambda: upload_model(store, output_dir / "model", marks))
    logger.info(
        f"done: {curriculum.total} steps; the model is in {output_dir / 'model'}{f' and {store.url}/model' if store else ''}"
    )
    return output_dir / "model"


def saved_line(disk: checkpoint.Disk, last: int) -> str:
    """What to do after a failure to export, when step `last`, the run's last, is saved."""
    line = f"Step {last}, the last, is saved: once the cause is gone, the same command writes the model, and trains nothing again"
    if not disk.shared:
        return line
    step, model = disk.directory / f"step-{last:08d}", disk.directory.parent / "model"
    return f"{line}, and so does: {shlex.join(['fastft', 'export', str(step), str(model)])}"


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
    lengths = np.array([len(step.data.ids[c]) for c in conversations])
    tokens = int(lengths.sum())
    return {
        "measured": measured,
        "lr": lr,
        "tokens": tokens,
        "trained_tokens": trained,
        "padding_tokens": len(step.rows) * config.seq_len - tokens,
        "squared_lengths": seen_squares(lengths, attention_windows(model.causal_lm.config)),
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


def build_batches(curriculum: Curriculum, config: TrainConfig, device: torch.device, step: Step) -> list[Batch]:
    """This rank's micro-batches of a step, where the device can fetch them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = rank_batches(step, rank, world, config.micro_batch_size, config.seq_len, curriculum.most_in_a_row)
    return [batch.pinned() if device.type == "cuda" else batch for batch in batches]


@torch.no_grad()
def evaluate(model: TrainedModel, data: TokenizedData, config: TrainConfig, device: torch.device) -> float:
    """Mean loss per trained token over the held-out conversations; collective."""
    rows = dist.get_world_size() * config.micro_batch_size
    curriculum = Curriculum([StepPlan(data, config.seq_len, config.seed, 1, rows, None)])
    total = torch.zeros((), device=device, dtype=torch.float64)
    model.eval()
    for number in range(1, curriculum.total + 1):
        for batch in build_batches(curriculum, config, device, curriculum.step(number)):
            total += model(**batch.to(device))[0]
    model.train()
    model.reshard()
    dist.all_reduce(total)
    return float(total) / int(data.trained_counts.sum())


def give_up(last: int, count: int, curriculum: Curriculum, config: TrainConfig) -> None:
    """Raise UserError for `count` bad steps in a row that ended with step `last`, naming their conversations."""
    first = last - count + 1
    names = []
    for step in map(curriculum.step, range(first, last + 1)):
        names += conversation_names(step.data, [int(c) for row in step.rows for c in row])
    names = list(dict.fromkeys(names))
    more = ""
    if len(names) > SHOWN_NAMES:
        path = Path(config.output_dir) / "bad_conversations.txt"
        if dist.get_rank() == 0:
            path.write_text("".join(f"{name}\n" for name in names))
        more = f" and {len(names) - SHOWN_NAMES} more, all in {path}"
    raise UserError(
        f"steps {first} to {last}: the loss or the gradient was not a finite number, so nothing was learned from them. "
        f"Lower optimizer.lr, or look at their conversations: {', '.join(names[:SHOWN_NAMES])}{more}"
    )


def open_reporter(
    config: TrainConfig, names: list[str], facts: dict, first: int, total: int, started: float
) -> Reporter | None:
    """The run's files and trackers, which the first process has; collective. Raises UserError where one does not open."""
    output_dir = Path(config.output_dir)

    def open_files() -> Reporter:
        save_config(config, output_dir / "config.yaml")
        run_id = write_facts(output_dir, facts)
        trackers = Trackers(names, output_dir, run_id, first, asdict(config))
        return Reporter(output_dir, first, total, trackers, config.price_per_hour, started)

    return everywhere(open_files if dist.get_rank() == 0 else None)


def step_epoch(schedule: StepPlan, step: Step) -> float:
    """Epochs done after this step, as a fraction."""
    start, end = schedule.starts[step.epoch], schedule.starts[step.epoch + 1]
    return step.epoch + (step.number - start) / (end - start)


def hash_seed(seed: int, number: int, rank: int) -> int:
    """One seed for each step and rank."""
    return ((seed * 1_000_003 + number) * 1_000_003 + rank) % 2**63


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code; 75 asks to be started again."""
    try:
        config = parse_config(sys.argv[1:] if argv is None else argv)
        mark = Path(config.output_dir) / stopping.MARK
        try:
            if not config.dry_run:
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"output_dir {config.output_dir}: {error.strerror}") from None
        try:
            train(config)
            mark.unlink(missing_ok=True)  # of a notice that came too late to matter
        except torch.OutOfMemoryError:
            raise UserError(out_of_memory_line(config, dist.get_world_size())) from None
    except Preempted as asked:
        if first_to_fail():
            print(asked, file=sys.stderr, flush=True)
        return stopping.EXIT_CODE
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
