"""Fine-tune a chat model on conversations: the whole run, to be read from top to bottom.

    torchrun --nproc-per-node 8 -m fastft.train --config run.yaml --optimizer.lr 1e-5
    fastft train --model MODEL --data conversations.jsonl --output_dir runs/first        # one process

Started again with the same command, a run continues from its newest complete checkpoint, and a finished run exits at once.
On CPU the result is bit for bit that of an uninterrupted run. Asked to leave (SIGTERM, a cloud's notice), it saves and exits
with code 75.
"""

import logging
import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from fastft.common import logs
from fastft.common.command_line import run_module
from fastft.common.distributed import (
    SET_UP_LIMIT,
    STEP_LIMIT,
    everywhere,
    first_to_fail,
    is_loss_of_peer,
    join_ranks,
    limit_waiting,
    local_rank,
    on_first,
    raise_anywhere,
    rank,
    world_size,
)
from fastft.common.files import write_whole
from fastft.config import TrainConfig, parse_config, save_config
from fastft.cost.flops import matrix_flops
from fastft.cost.memory import out_of_memory_line
from fastft.data.batch import Batch, ahead
from fastft.data.dataset import conversation_names
from fastft.data.step_plan import Step
from fastft.errors import UserError
from fastft.model import huggingface
from fastft.model.attention import choose_attention
from fastft.model.build import TrainedModel, prepare_model
from fastft.model.isolation import prove_isolation
from fastft.train.checkpoint import local
from fastft.train.checkpoint.remote import Uploader, upload_model
from fastft.train.checkpoint.resume import Candidate, find_candidates, finished_model, open_store, resume, take_lease
from fastft.train.checkpoint.save_interval import SaveInterval
from fastft.train.dry_run import dry_run_steps
from fastft.train.inputs import RunInputs, read_inputs
from fastft.train.optim import SkippedSteps, build_optimizer, learning_rate
from fastft.train.preemption import notices
from fastft.train.preemption.stop import EXIT_CODE, NOTE_FILE, Preempted, StopFlag
from fastft.train.report.card import model_card
from fastft.train.report.metrics import Reporter, step_rows
from fastft.train.report.page import refresh_page
from fastft.train.report.run_dir import describe, read_run, write_facts
from fastft.train.report.startup import Startup
from fastft.train.report.trackers import Trackers
from fastft.train.run_lock import lock
from fastft.train.step import build_batches, evaluate, plan_held_out, train_step

logger = logging.getLogger(__name__)

SHOWN_NAMES = 10  # conversations in an error's one line; the rest are in a file


def train(config: TrainConfig) -> Path | None:
    """Run to the end, and return the directory of the exported model; None after a dry run.

    Raises UserError for the user's mistakes, and Preempted if the run was asked to leave.
    """
    with ExitStack() as at_exit:
        started, device = time.monotonic(), join_ranks()
        stop_flag = lock_and_listen(config, at_exit)
        startup = Startup()

        writable = Path(at_exit.enter_context(TemporaryDirectory()) if config.dry_run else config.output_dir)
        inputs = read_inputs(config, writable / "model")
        startup.done("data")
        if config.dry_run:
            return dry_run(inputs, device)

        disk = local.Disk(inputs.output_dir / "checkpoints")
        store = open_store(config.checkpoint.remote, disk)
        finished = config.resume and finished_model(
            inputs.output_dir, store, inputs.identity, inputs.total, adapters=bool(config.lora.r)
        )
        if finished:
            logger.info("finished: step %d of %d is done; the model is in %s", inputs.total, inputs.total, finished)
            return inputs.output_dir / "model"
        lease = take_lease(store, at_exit)
        candidates = find_candidates(config, disk, store, inputs.identity)
        refuse_fewer_steps(candidates, inputs.total)
        startup.done("checkpoints found")

        model, optimizer = model_and_optimizer(inputs, device, resumed=bool(candidates))
        startup.done("model")
        resumed_from = resume(candidates, disk, store, model, optimizer, config)
        startup.done("checkpoint")
        prove_isolation(model, device)

        start_step = resumed_from["step"]
        reporter = open_reporter(inputs, device, start_step, started)
        inputs.sampler.open(inputs.output_dir, start_step)
        retention = config.checkpoint.keep, config.checkpoint.keep_every
        uploader = Uploader(store, lease, disk.leaders, *retention) if store else None
        writer = local.Writer(disk, *retention, uploader)
        interval = SaveInterval(config.checkpoint, len(disk.leaders), writer)
        if disk.is_leader:
            notices.watch(stop_flag)
        dist.barrier()
        if start_step == 0 and inputs.sampler.prompts:
            inputs.sampler.ask(model, 0, device)
        startup.done("files")

        skipped = SkippedSteps(**resumed_from["skipped"])
        Loop(
            inputs=inputs,
            device=device,
            model=model,
            optimizer=optimizer,
            start_step=start_step,
            skipped=skipped,
            stop_flag=stop_flag,
            reporter=reporter,
            writer=writer,
            save_interval=interval,
            startup=startup,
        ).run()
        export(inputs, model, disk, reporter, uploader)
        where = f"{inputs.output_dir / 'model'}{f' and {store.url}/model' if store else ''}"
        logger.info("done: %d steps; the model is in %s", inputs.total, where)
        return inputs.output_dir / "model"


def lock_and_listen(config: TrainConfig, at_exit: ExitStack) -> StopFlag:
    """Lock the run's directory, which a dry run does not need, and listen for signals until `at_exit` closes; collective."""
    note_file = None
    if not config.dry_run:
        output_dir = Path(config.output_dir)
        lock(output_dir, at_exit)
        if local_rank() == 0:
            note_file = output_dir / NOTE_FILE
            note_file.unlink(missing_ok=True)
    stop_flag = StopFlag(note_file)
    at_exit.callback(stop_flag.restore_signals)
    return stop_flag


def dry_run(inputs: RunInputs, device: torch.device) -> None:
    """Take two steps with the fullest rows of the run, and log their memory and time; collective."""
    config = inputs.config
    model, optimizer = model_and_optimizer(inputs, device, resumed=False)
    prove_isolation(model, device)

    def take_step(step: Step) -> dict:
        batches = build_batches(inputs.curriculum, config, device, step)
        return train_step(model, optimizer, step, batches, config, 1, config.optimizer.lr, device)

    dry_run_steps(take_step, inputs.curriculum, config, device)


def model_and_optimizer(
    inputs: RunInputs, device: torch.device, resumed: bool
) -> tuple[TrainedModel, torch.optim.Optimizer]:
    """Build the model and its optimizer; collective. A run that is `resumed` does not read the weights of its checkpoint."""
    attention, why = choose_attention(inputs.config.attention, device)
    logger.info(why)
    model = prepare_model(inputs.config, inputs.model_config, attention, device, resumed=resumed)
    return model, build_optimizer(model, inputs.config)


def refuse_fewer_steps(candidates: list[Candidate], total: int) -> None:
    """Raise UserError if a run of `total` steps would continue after its end."""
    if candidates and (step := candidates[0].meta["step"]) > total:
        raise UserError(
            f"step {step} is done, and these settings end with step {total}: raise max_steps or epochs, or write that step's "
            "model with fastft export"
        )


def open_reporter(inputs: RunInputs, device: torch.device, start_step: int, started: float) -> Reporter | None:
    """Open the run's files and trackers on rank 0; collective. Raises UserError if one cannot be opened.

    `start_step` is the step of the checkpoint from which the run continues, and `started` the time.monotonic() at which this
    start of the run began.
    """
    config, output_dir = inputs.config, inputs.output_dir
    facts = describe(config, inputs.template, inputs.curriculum, inputs.eval_data, device, dist.get_world_size())

    def open_files() -> Reporter:
        save_config(config, output_dir / "config.yaml")
        run_id, earlier_s = write_facts(output_dir, facts)
        trackers = Trackers(inputs.trackers, output_dir, run_id, start_step, asdict(config))
        return Reporter(output_dir, start_step, inputs.total, trackers, config.price_per_hour, started, earlier_s)

    return everywhere(open_files if dist.get_rank() == 0 else None)


@dataclass(kw_only=True)
class Loop:
    """Takes the optimizer steps of a run, and does what is due after each: reports, held-out losses, samples, checkpoints."""

    inputs: RunInputs
    device: torch.device
    model: TrainedModel
    optimizer: torch.optim.Optimizer
    start_step: int
    """The step of the checkpoint from which the run continues, 0 for a new run."""
    skipped: SkippedSteps
    stop_flag: StopFlag
    reporter: Reporter | None
    """None on ranks other than 0."""
    writer: local.Writer
    save_interval: SaveInterval
    startup: Startup

    def run(self) -> None:
        """Take the remaining steps, and return when the last one is saved; collective.

        Raises Preempted if a rank was asked to leave, UserError if too many steps in a row are not finite or if a checkpoint
        cannot be written.
        """
        inputs, total = self.inputs, self.inputs.total
        self.matrices = matrix_flops(self.model)
        self.held_out = plan_held_out(inputs.eval_data, inputs.config) if inputs.eval_data else None
        # Numbers of steps that are still on the device, because reading them waits for it.
        self.pending: list[dict] = []
        self.timed_from = began = time.perf_counter()
        steps = map(inputs.curriculum.step, range(self.start_step + 1, total + 1))
        batches = partial(build_batches, inputs.curriculum, inputs.config, self.device)
        with self.stop_flag.deferred(self.start_step):
            for number, (step, its_batches) in enumerate(ahead(steps, batches), self.start_step + 1):
                self.take(number, step, its_batches)
                self.after(number)
                if number == self.start_step + 1:  # it also compiled; a rank that is late from now on is dead
                    self.startup.done("step")
                    logger.info(str(self.startup))
                    limit_waiting(STEP_LIMIT, self.writer.patient_groups)
            looped_s = time.perf_counter() - began
            limit_waiting(SET_UP_LIMIT)
            self.writer.wait()
            stops, _ = self.stop_flag.agreed(total, save=False, last=True)
            if stops:  # a stop was asked for while the last step was evaluated or saved
                leave_early(total, self.stop_flag, self.writer)
        if self.writer.saves:
            logger.info(
                f"checkpoints: {self.writer.saves} saved; training waited {self.writer.total_blocking_s:.2f} s for them, "
                f"{self.writer.total_blocking_s / looped_s:.1%} of its time"
            )

    def take(self, number: int, step: Step, batches: list[Batch]) -> None:
        """Take step `number` of the run, without waiting for the device."""
        config, stage = self.inputs.config, self.inputs.curriculum.stages[step.stage]
        lr = learning_rate(self.inputs.stages[step.stage], step.number, stage.total)
        numbers = train_step(self.model, self.optimizer, step, batches, config, number, lr, self.device)
        epoch_start, epoch_end = stage.starts[step.epoch], stage.starts[step.epoch + 1]
        epoch = step.epoch + (step.number - epoch_start) / (epoch_end - epoch_start)
        where = {"stage": step.stage + 1} if config.stages else {}
        self.pending.append({**numbers, "number": number, **where, "epoch": epoch})

    def after(self, number: int) -> None:
        """Do what is due after step `number`; collective. Raises Preempted if the ranks agree to leave."""
        inputs, config, last = self.inputs, self.inputs.config, number == self.inputs.total
        stops, saves = self.stop_flag.agreed(number, dist.get_rank() == 0 and self.save_interval.wants_one())
        saves = saves or last or stops or self.save_interval.is_due(number)
        evaluates = self.held_out is not None and (number % config.eval_every == 0 or last) and not stops
        asks = inputs.sampler.is_due(number, inputs.total) and not stops
        pauses = saves or evaluates or asks
        if pauses or number % config.log_every == 0:
            self.report()
        if evaluates:
            loss = evaluate(self.model, self.held_out, config, self.device)
            if self.reporter:
                self.reporter.evaluation({"step": number, "eval_loss": loss})
        if asks:
            inputs.sampler.ask(self.model, number, self.device)
        if pauses and self.reporter:
            self.reporter.flush()
            refresh_page(inputs.output_dir)
        if saves:
            own = {"identity": inputs.identity, "skipped": asdict(self.skipped)}
            self.writer.save(number, self.model, self.optimizer, own)
            self.save_interval.saved()
            # After the last step the model is written first. After the first one nothing is uploaded yet, and waits have
            # no limit yet by which a rank that is dead would be noticed.
            if not last and number > self.start_step + 1:
                self.writer.end_after_bug_of_upload()
        if stops:
            leave_early(number, self.stop_flag, self.writer)
        if pauses:
            self.timed_from = time.perf_counter()

    def report(self) -> None:
        """Wait for the device, read the numbers of the pending steps, and write their rows.

        Raises UserError on every rank once `max_bad_steps` steps in a row were skipped.
        """
        seconds = time.perf_counter() - self.timed_from
        for row in step_rows(self.pending, seconds, self.model, self.matrices, self.device):
            self.skipped.count(row)
            if self.reporter:
                self.reporter.step(row)
            if self.skipped.in_a_row >= self.inputs.config.max_bad_steps:
                if self.reporter:
                    self.reporter.flush()
                give_up(row["step"], self.skipped.in_a_row, self.inputs)
        self.pending.clear()
        self.timed_from = time.perf_counter()


def give_up(last: int, count: int, inputs: RunInputs) -> None:
    """Raise UserError because the `count` steps up to step `last` were skipped, and name their conversations."""
    first, names = last - count + 1, []
    for step in map(inputs.curriculum.step, range(first, last + 1)):
        names += conversation_names(step.data, [int(c) for row in step.rows for c in row])
    names = list(dict.fromkeys(names))
    more = ""
    if len(names) > SHOWN_NAMES:
        path = inputs.output_dir / "bad_conversations.txt"
        if dist.get_rank() == 0:
            write_whole(path, "".join(f"{name}\n" for name in names))
        more = f" and {len(names) - SHOWN_NAMES} more, all in {path}"
    raise UserError(
        f"steps {first} to {last}: the loss or the gradient was not a finite number, so nothing was learned from them. "
        f"Lower optimizer.lr, or look at their conversations: {', '.join(names[:SHOWN_NAMES])}{more}"
    )


def leave_early(step: int, stop_flag: StopFlag, writer: local.Writer) -> None:
    """Finish the current save, upload it as far as the time allows, and raise Preempted; collective."""
    limit_waiting(SET_UP_LIMIT)
    writer.wait()
    where = "saved"
    if writer.uploader:
        uploaded = on_first(lambda: writer.uploader.finish(stop_flag.remaining_s()))
        writer.end_after_bug_of_upload()
        where += " and uploaded" if uploaded else ", on this disk only: there was no time to upload it"
    left = Preempted(f"asked to leave ({stop_flag.reason}): step {step} is {where}; start the same command again")
    stop_flag.note(str(left))
    dist.barrier()  # once the first process has left, torchrun stops the others
    raise left


def export(
    inputs: RunInputs, model: TrainedModel, disk: local.Disk, reporter: Reporter | None, uploader: Uploader | None
) -> None:
    """Write the trained model with its card and, if the run has a storage, upload it; collective.

    The last checkpoint is saved by now, so an error says how to write the model without training again.
    """
    output_dir = inputs.output_dir
    with huggingface.advising(advice(disk, inputs.total)):
        try:
            if reporter:
                reporter.close()
            card = model_card(read_run(output_dir), inputs.total) if reporter else ""
            huggingface.export(model, inputs.model_files, output_dir / "model", card, output_dir / "adapter")
        except Exception:
            if uploader:
                uploader.finish()  # if the model is not written, the last checkpoint is all that remains of the run
            raise
    if reporter:
        refresh_page(output_dir)
    if uploader:
        uploader.finish()
        raise_anywhere(uploader.bug)
        meta = disk.manifest_of(inputs.total, {"identity": inputs.identity})
        on_first(lambda: upload_model(uploader.store, output_dir / "model", meta))


def advice(disk: local.Disk, last: int) -> str:
    """Say what to do if the export fails. Step `last` is the run's last, which is saved by then."""
    line = f"Step {last}, the last, is saved: once the cause is gone, the same command writes the model, and trains nothing again"
    if not disk.shared:
        return line
    step, model = disk.directory / f"step-{last:08d}", disk.directory.parent / "model"
    return f"{line}, and so does: {shlex.join(['fastft', 'export', str(step), str(model)])}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code; 75 asks to be started again. Only rank 0 writes to the terminal."""
    if rank() != 0:
        logs.show(logging.ERROR)
    try:
        code = train_to_exit_code(parse_config(sys.argv[1:] if argv is None else argv))
    except Exception as error:
        if is_loss_of_peer(error):
            # gloo's message, without the place in its source before it and the advice after it
            reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". This is typically")[0]
            raise UserError(
                f"another process of the run has ended ({reason}); its own line, or torchrun's, says why. Start the same "
                "command again"
            ) from None
        # With several processes the group stays open until this process has ended. If it were closed here, the others would
        # fail before the cause is printed.
        if world_size() == 1:
            leave_ranks()
        raise
    leave_ranks()
    return code


def train_to_exit_code(config: TrainConfig) -> int:
    """Train, and return the exit code: 0, or 75 after a preemption.

    After a preemption the file OUTPUT_DIR/preempted is there for the run script.
    """
    try:
        train(config)
    except torch.OutOfMemoryError:
        raise UserError(out_of_memory_line(config, world_size())) from None
    except Preempted as asked:
        logger.warning(str(asked))
        return EXIT_CODE
    if not config.dry_run:  # a notice may have come after the last step
        (Path(config.output_dir) / NOTE_FILE).unlink(missing_ok=True)
    return 0


def leave_ranks() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_module(main, first_to_fail)
