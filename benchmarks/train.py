"""Real tokens a second of training: fastft beside plain padding and TRL's SFTTrainer, on the same model and data.

    python benchmarks/train.py                                       CPU: a small Llama, two minutes
    python benchmarks/train.py --shape llama-7b --seq_len 2048        one GPU: random weights, bf16, compile
    pip install --target DIR --no-deps trl accelerate psutil; … --trl DIR      with TRL (1.16 was measured)

Data: --data, conversations as `python -m cleaning --max_tokens SEQ_LEN` writes them; by default conversations of random words
with the lengths of a sample of ShareGPT V3 (log-normal, median 700 tokens, cut at the sequence length). Contestants run one
after the other, each in a process of its own, for the same number of optimizer steps of --rows x seq_len positions. The first
quarter of the steps is warm-up: tokens/s are the tokens of the other steps divided by their time, a step's time is their
median. Only tokens that are not padding are counted. MFU is measured for fastft only, on a GPU: the matrix products that the
model needs for these tokens, with attention over each conversation alone (fastft.cost.flops). Losses are those of the first
and the last step, to compare float8's with bf16's. --profile takes one more step of fastft's and lists what takes its time.

    padded       FastChat's way: every conversation padded to the sequence length, plain transformers, AdamW
    trl          SFTTrainer with its defaults, except that max_length is the sequence length
    trl packing  the same with packing=True
    fastft       with its defaults; fastft float8 with --float8 on GPUs that have it
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal
from unittest.mock import patch

from fastft.common.command_line import option, parse, run
from fastft.errors import UserError

SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 4, "vocab_size": 4096},
    # Llama-3.2-1B and Llama-2-7B.
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip


@dataclass
class TrainBenchmark:
    """Options of this benchmark."""

    shape: Literal[tuple(SHAPES)] = "small"
    """The model's shape; its weights are random."""
    seq_len: int = 2048
    """Sequence length."""
    rows: int = 4
    """Rows of seq_len positions for each optimizer step."""
    micro: int = 1
    """Rows at a time."""
    steps: int = 8
    """Optimizer steps."""
    gradient_checkpointing: Literal["none", "selective", "full"] = "full"
    """What the backward pass computes again, as for fastft train."""
    data: Path | None = None
    """Conversations; by default random words with the lengths of a sample of ShareGPT."""
    model: Path | None = None
    """A model's directory; made if it is missing, to be used again."""
    trl: Path | None = None
    """Where TRL is installed, to measure it, too."""
    float8: bool = False
    """Measure fastft with float8, too."""
    profile: bool = False
    """Take one more step of fastft's, and list what takes its time."""
    only: list[str] = option(repeated=True)
    """Measure this contestant; give it again for several. By default all are measured."""
    work: Path | None = None
    """For the process of a contestant, which this benchmark starts: where it writes."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.only if name not in CONTESTANTS]:
            raise UserError(f"only: {unknown[0]!r} is not one of {', '.join(CONTESTANTS)}")

    @property
    def gpu(self) -> bool:
        import torch

        return torch.cuda.is_available()


def make_model(path: Path, shape: str, data: Path) -> None:
    """Random weights, and a byte-level tokenizer trained on the data with ChatML's template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from fastft.data.conversation import read_conversations
    from fastft.data.template.chat_template import template_for

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator((m.content for c in read_conversations(data) for m in c.messages), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    fast.chat_template = template_for(fast, "chatml").source
    fast.save_pretrained(path)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = AutoConfig.for_model("llama", dtype=dtype, max_position_embeddings=1 << 17, **SHAPES[shape])
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)


def make_data(path: Path, seq_len: int, count: int) -> None:
    """Write conversations of random words with the lengths of ShareGPT's."""
    import random

    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnopqrstuvwxyz", k=choose.randint(2, 8))) for _ in range(3_000)]
    with path.open("w") as out:
        for number in range(count):
            length = min(int(choose.lognormvariate(6.55, 0.9)), seq_len // 2)  # words; up to two tokens each
            messages = []
            while length > 0:
                question, answer = choose.randint(5, 60), choose.randint(30, 250)
                messages.append({"role": "user", "content": " ".join(choose.choices(words, k=min(question, length)))})
                messages.append(
                    {"role": "assistant", "content": " ".join(choose.choices(words, k=min(answer, length)))}
                )
                length -= question + answer
            out.write(json.dumps({"id": str(number), "messages": messages}) + "\n")


# Contestants: each runs in a process of its own and prints a line of JSON --------------------------------------------------


def run_fastft(options: TrainBenchmark, more: tuple[str, ...] = ()) -> dict:
    """The trainer itself up to its last step, without the checkpoint and the export, which are 95 GB for a 7B model.

    After an error, `error` is added to what was measured until then.
    """
    from fastft import cli
    from fastft.model import huggingface
    from fastft.train import loop
    from fastft.train.checkpoint import local
    from fastft.train.report.metrics import read_metrics

    out, costs = options.work / f"fastft{'-'.join(more)}", []
    flags = [
        "--model", options.model, "--data", options.data, "--output_dir", out, "--seq_len", options.seq_len,
        "--global_batch_size", options.rows, "--micro_batch_size", options.micro,
        "--max_steps", options.steps + options.profile, "--overlong", "split", "--epochs", 100, "--checkpoint.every", 0,
        "--gradient_checkpointing", options.gradient_checkpointing, "--compile", str(options.gpu).lower(), *more,
    ]  # fmt: skip
    step = loop.train_step

    def watched(*arguments):
        if arguments[5] <= options.steps:
            return step(*arguments)
        return profiled(lambda: step(*arguments), costs, options.gpu)

    with (
        patch.object(local.Writer, "save"),
        patch.object(huggingface, "export"),
        patch.object(loop, "train_step", watched),
        redirect_stderr(io.StringIO()) as said,
    ):
        code = cli.main(["train", *map(str, flags)])
    wrong = {"error": (said.getvalue().strip().splitlines() or ["no message"])[-1]} if code else {}
    metrics = out / "metrics.jsonl"
    rows = [row for row in read_metrics(metrics) if "loss" in row][: options.steps] if metrics.exists() else []
    if not rows:
        return wrong
    memory = max(row["memory_gib"] for row in rows)
    found = summary([row["tokens"] for row in rows], [row["step_time_s"] for row in rows], memory)
    shares = [row["mfu"] for row in rows if row["mfu"] is not None]
    found |= {"mfu": statistics.median(shares)} if shares else {}
    return found | {"losses": [rows[0]["loss"], rows[-1]["loss"]], "costs": costs} | wrong


def profiled(run, costs: list, gpu: bool):
    """The result of `run`. Adds the share and the name of the eight kernels (on CPU: operations) that took longest to `costs`."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        result = run()
        if gpu:
            torch.cuda.synchronize()
    events = [(e.self_device_time_total if gpu else e.self_cpu_time_total, e.key) for e in seen.key_averages()]
    whole = sum(time for time, _ in events) or 1
    costs += [[time / whole, name] for time, name in sorted(events, reverse=True)[:8]]
    return result


def run_padded(options: TrainBenchmark) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    from fastft.data.dataset import fit_to_seq_len, tokenized
    from fastft.data.template.chat_template import load_template

    device = "cuda" if options.gpu else "cpu"
    data = tokenized(str(options.data), load_template(str(options.model)), options.seq_len)
    data, _ = fit_to_seq_len(data, options.seq_len, "drop", str(options.data))
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device).train()
    if options.gradient_checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens, times, at = [], [], 0
    for _ in range(options.steps):
        began, count = time.perf_counter(), 0
        for _ in range(options.rows // options.micro):
            ids, mask = torch.zeros(2, options.micro, options.seq_len, dtype=torch.long)
            labels = torch.full((options.micro, options.seq_len), -100)
            for place in range(options.micro):
                row, trained = data.ids[at % len(data.ids)], data.trained[at % len(data.ids)]
                ids[place, : len(row)] = torch.from_numpy(row.astype("int64"))
                mask[place, : len(row)] = 1
                labels[place, : len(row)] = torch.where(torch.from_numpy(trained.copy()), ids[place, : len(row)], -100)
                count, at = count + len(row), at + 1
            with torch.autocast(device, torch.bfloat16, enabled=options.gpu):
                loss = model(ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss
            (loss * options.micro / options.rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if options.gpu:
            torch.cuda.synchronize()
        tokens.append(count)
        times.append(time.perf_counter() - began)
    return summary(tokens, times, torch.cuda.max_memory_allocated() / 2**30 if options.gpu else 0)


def run_trl(options: TrainBenchmark, packing: bool = False) -> dict:
    import torch
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    dataset = load_dataset("json", data_files=str(options.data), split="train").select_columns(["messages"])
    settings = SFTConfig(
        output_dir=str(options.work / f"trl{packing}"), max_length=options.seq_len, packing=packing,
        max_steps=options.steps, per_device_train_batch_size=options.micro,
        gradient_accumulation_steps=options.rows // options.micro, bf16=options.gpu, use_cpu=not options.gpu,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    tokens, times = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            counted.append(0)
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            if options.gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - self.began)

    trainer = SFTTrainer(str(options.model), args=settings, train_dataset=dataset, callbacks=[Clock()])
    collate, pad, counted = trainer.data_collator, trainer.processing_class.pad_token_id, []
    held: list[int] = []

    def counting(examples):
        batch = collate(examples)
        held.append(int((batch["input_ids"] != pad).sum()))
        return batch

    trainer.data_collator = counting
    trainer.train()
    each = options.rows // options.micro
    tokens = [sum(held[i * each : (i + 1) * each]) for i in range(len(times))]
    return summary(tokens, times, torch.cuda.max_memory_allocated() / 2**30 if options.gpu else 0)


def summary(tokens: list[int], times: list[float], memory: float) -> dict:
    first = len(times) // 4
    return {
        "tokens_per_s": sum(tokens[first:]) / sum(times[first:]),
        "step_s": statistics.median(times[first:]),
        "memory_gib": memory,
    }


CONTESTANTS = {
    "padded": run_padded,
    "trl": run_trl,
    "trl packing": lambda options: run_trl(options, packing=True),
    "fastft": run_fastft,
    "fastft float8": lambda options: run_fastft(options, ("--float8", "true")),
}


def show(results: dict[str, dict], options: TrainBenchmark) -> None:
    from rich.console import Console
    from rich.table import Table

    console, base = Console(highlight=False, width=120), results.get("padded", {}).get("tokens_per_s")
    table = Table(
        title=f"{options.shape}, sequence length {options.seq_len}, {options.rows} rows a step", title_justify="left"
    )
    for column in ("", "real tokens/s", "ratio", "step", "memory", "MFU", "loss"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in results.items():
        if "tokens_per_s" not in found:
            table.add_row(name, "none")
            continue
        ratio = f"{found['tokens_per_s'] / base:.2f}x" if base else ""
        memory = f"{found['memory_gib']:.1f} GiB" if found["memory_gib"] else ""
        share = f"{found['mfu']:.1%}" if "mfu" in found else ""
        losses = " to ".join(f"{loss:.4f}" for loss in found.get("losses", ()))
        table.add_row(name, f"{found['tokens_per_s']:,.0f}", ratio, f"{found['step_s']:.2f} s", memory, share, losses)
    console.print(table)
    for name, found in results.items():
        if "error" in found:
            console.print(f"{name}: {found['error']}", markup=False)
        for share, kernel in found.get("costs", ()):
            console.print(f"{name}: {share:6.1%}  {kernel[:100]}", markup=False)


def run_alone(name: str, options: TrainBenchmark) -> dict:
    """The results of a contestant, which runs in a process of its own."""
    path = os.pathsep.join([str(options.trl)] * bool(options.trl) + [os.environ.get("PYTHONPATH", "")])
    same = ("shape", "seq_len", "rows", "micro", "steps", "gradient_checkpointing", "data", "model", "work")
    flags = [f"--{key}={getattr(options, key)}" for key in same] + ["--profile"] * options.profile
    command = [sys.executable, __file__, *flags, f"--only={name}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    [options] = parse(sys.argv[1:], "benchmarks/train.py", __doc__.splitlines()[0], TrainBenchmark)
    if options.work:
        print(json.dumps(CONTESTANTS[options.only[0]](options)))
        return 0
    names = options.only or [
        n for n in CONTESTANTS if (options.trl or "trl" not in n) and (options.float8 or "8" not in n)
    ]
    with tempfile.TemporaryDirectory() as work:
        os.environ["FASTFT_CACHE"] = f"{work}/cache"
        options.work, options.model = Path(work), options.model or Path(work) / "model"
        if not options.data:
            options.data = Path(work) / "data.jsonl"
            make_data(options.data, options.seq_len, options.rows * options.steps * 12)
        if not options.model.exists():
            # In a process of its own, so that the GPU's memory is free again afterwards.
            partial = options.model.with_name(f"{options.model.name}.partial")
            maker = get_context("spawn").Process(target=make_model, args=(partial, options.shape, options.data))
            maker.start()
            maker.join()
            if maker.exitcode:
                raise UserError(f"{options.shape}: the model could not be made; the lines above say why")
            partial.rename(options.model)
        results = {}
        for name in names:
            results[name] = run_alone(name, options)
            print(json.dumps({name: results[name]}), flush=True)
    show(results, options)
    return int(any("error" in found for found in results.values()))


if __name__ == "__main__":
    sys.exit(run(main))
