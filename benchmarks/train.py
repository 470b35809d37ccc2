"""Real tokens a second of training: fastft beside padding to the window and TRL's SFTTrainer, on the same model and data.

    python benchmarks/train.py                                       CPU: a small Llama, two minutes
    python benchmarks/train.py --shape llama-7b --window 2048        one GPU: random weights, bf16, compile
    pip install --target DIR --no-deps trl accelerate psutil; … --trl DIR      with TRL (1.16 was measured)

Data: --data, conversations as `python -m cleaning --max_tokens WINDOW` writes them; by default conversations of random words
with the lengths of a sample of ShareGPT V3 (log-normal, median 700 tokens, cut at the window). Contestants run one after the
other, each in a process of its own, so many optimiser steps of --rows x window positions; a step's time is the median of
all but the first quarter. Counted are tokens that are not padding. MFU is ours, on a GPU: products of
matrices that the model needs for these tokens, attention over each conversation alone (fastft.metrics).

    padded       FastChat's way: every conversation padded to the window, plain transformers, AdamW
    trl          SFTTrainer as it comes, only max_length set to the window
    trl packing  the same with packing=True
    fastft       as it comes; fastft float8 with --float8 where the GPU can
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 4, "vocab_size": 4096},
    # Llama-3.2-1B and Llama-2-7B.
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip


def make_model(path: Path, shape: str, data: Path, window: int) -> None:
    """Random weights, and a byte-level tokenizer trained on the data with ChatML's template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from fastft.conversation import read_conversations
    from fastft.template import chat_template

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
    fast.chat_template = chat_template(fast, "chatml").source
    fast.save_pretrained(path)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    config = AutoConfig.for_model("llama", dtype=dtype, max_position_embeddings=max(window, 2048), **SHAPES[shape])
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)


def make_data(path: Path, window: int, count: int) -> None:
    """Conversations of random words whose lengths are as those of ShareGPT."""
    import random

    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnopqrstuvwxyz", k=choose.randint(2, 8))) for _ in range(3_000)]
    with path.open("w") as out:
        for number in range(count):
            length = min(int(choose.lognormvariate(6.55, 0.9)), window // 2)  # words; up to two tokens each
            messages = []
            while length > 0:
                question, answer = choose.randint(5, 60), choose.randint(30, 250)
                messages.append({"role": "user", "content": " ".join(choose.choices(words, k=min(question, length)))})
                messages.append(
                    {"role": "assistant", "content": " ".join(choose.choices(words, k=min(answer, length)))}
                )
                length -= question + answer
            out.write(json.dumps({"id": str(number), "messages": messages}) + "\n")


# --- contestants: each runs in a process of its own and prints a line of JSON -------------------------------------------


def run_fastft(options: argparse.Namespace, more: tuple[str, ...] = ()) -> dict:
    out = options.work / f"fastft{'-'.join(more)}"
    flags = [
        "--model", options.work / "model", "--data", options.data, "--output_dir", out, "--window", options.window,
        "--global_batch_size", options.rows, "--micro_batch_size", options.micro, "--max_steps", options.steps,
        "--overlong", "split", "--epochs", 100, "--checkpoint.every", 0,
        "--gradient_checkpointing", options.gradient_checkpointing, "--compile", str(options.gpu).lower(), *more,
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "fastft.train", *map(str, flags)], capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    steps = [(r["tokens"], r["step_time_s"], r.get("memory_gib")) for r in rows if "loss" in r]
    found = summary([s[0] for s in steps], [s[1] for s in steps], max((s[2] or 0 for s in steps), default=0))
    shares = [r["mfu"] for r in rows if r.get("mfu") is not None]
    return found | ({"mfu": statistics.median(shares)} if shares else {})


def run_padded(options: argparse.Namespace) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    from fastft.data import fit_to_window, tokenized
    from fastft.template import load_template

    device = "cuda" if options.gpu else "cpu"
    data = tokenized(str(options.data), load_template(str(options.work / "model")), options.window)
    data, _ = fit_to_window(data, options.window, "drop", str(options.data))
    model = AutoModelForCausalLM.from_pretrained(options.work / "model", dtype=torch.float32).to(device).train()
    if options.gradient_checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens, times, at = [], [], 0
    for _ in range(options.steps):
        began, count = time.perf_counter(), 0
        for _ in range(options.rows):
            ids = torch.zeros(1, options.window, dtype=torch.long)
            labels = torch.full((1, options.window), -100)
            row = data.ids[at % len(data.ids)]
            ids[0, : len(row)] = torch.from_numpy(row.astype("int64"))
            labels[0, : len(row)] = torch.where(
                torch.from_numpy(data.trained[at % len(data.ids)].copy()), ids[0, : len(row)], -100
            )
            mask = (torch.arange(options.window) < len(row)).long()[None]
            with torch.autocast(device, torch.bfloat16, enabled=options.gpu):
                loss = model(ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss
            (loss / options.rows).backward()
            count, at = count + len(row), at + 1
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if options.gpu:
            torch.cuda.synchronize()
        tokens.append(count)
        times.append(time.perf_counter() - began)
    return summary(tokens, times, torch.cuda.max_memory_allocated() / 2**30 if options.gpu else 0)


def run_trl(options: argparse.Namespace, packing: bool = False) -> dict:
    import torch
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    dataset = load_dataset("json", data_files=str(options.data), split="train").select_columns(["messages"])
    settings = SFTConfig(
        output_dir=str(options.work / f"trl{packing}"), max_length=options.window, packing=packing,
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

    trainer = SFTTrainer(str(options.work / "model"), args=settings, train_dataset=dataset, callbacks=[Clock()])
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


def show(results: dict[str, dict], options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    base = results.get("padded", {}).get("tokens_per_s")
    table = Table(title=f"{options.shape}, window {options.window}, {options.rows} rows a step", title_justify="left")
    for column in ("", "real tokens/s", "ratio", "step", "memory", "MFU"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in results.items():
        if "error" in found:
            table.add_row(name, found["error"][:80])
            continue
        ratio = f"{found['tokens_per_s'] / base:.2f}x" if base else ""
        memory = f"{found['memory_gib']:.1f} GiB" if found["memory_gib"] else ""
        share = f"{found['mfu']:.1%}" if "mfu" in found else ""
        table.add_row(name, f"{found['tokens_per_s']:,.0f}", ratio, f"{found['step_s']:.2f} s", memory, share)
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=4, help="of the window, for each optimiser step")
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--gradient_checkpointing", default="full", choices=("none", "selective", "full"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--trl", type=Path, metavar="DIR")
    parser.add_argument("--float8", action="store_true")
    parser.add_argument("--only", choices=CONTESTANTS, action="append")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # of a contestant's process
    options = parser.parse_args()
    import torch

    options.gpu = torch.cuda.is_available()
    if options.work:
        print(json.dumps(CONTESTANTS[options.only[0]](options)))
        return 0
    names = options.only or [
        n for n in CONTESTANTS if (options.trl or "trl" not in n) and (options.float8 or "8" not in n)
    ]
    with tempfile.TemporaryDirectory() as work:
        os.environ["FASTFT_CACHE"] = f"{work}/cache"
        data = options.data or Path(work) / "data.jsonl"
        if not options.data:
            make_data(data, options.window, options.rows * options.steps * 12)
        make_model(Path(work) / "model", options.shape, data, options.window)
        results = {}
        for name in names:
            path = os.pathsep.join([str(options.trl)] * bool(options.trl) + [os.environ.get("PYTHONPATH", "")])
            same = ("shape", "window", "rows", "micro", "steps", "gradient_checkpointing")
            flags = [f"--{key}={getattr(options, key)}" for key in same]
            command = [sys.executable, __file__, *flags, f"--data={data}", f"--only={name}", f"--work={work}"]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
            last = (done.stdout.strip().splitlines() or ["{}"])[-1]
            wrong = {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
            results[name] = json.loads(last) if done.returncode == 0 else wrong
            print(json.dumps({name: results[name]}), flush=True)
    show(results, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
