"""The memory and time that a process needs to load its share of a model: our way, and from_pretrained followed by FSDP2.

    python benchmarks/loading.py

The model is a Llama of 150 M parameters, 299 MB in bf16, loaded on a CPU with master weights in fp32. The figures are a
process's peak above what it held before: of its own memory, and of that together with the pages of the mapped file, which
the system can take back.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from fastft.common.command_line import option, parse, run

TESTS = Path(__file__).parents[1] / "tests"
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 21, "num_attention_heads": 12}


@dataclass
class LoadingBenchmark:
    """What the processes that this benchmark starts are told; a user has nothing to choose."""

    way: Literal["ours", "from_pretrained"] | None = option(None, positional=True)
    """How to load the model; by default every way is measured, in processes of its own."""
    model: str | None = option(None, positional=True)
    """The model's directory."""


def main() -> None:
    [options] = parse(sys.argv[1:], "benchmarks/loading.py", __doc__.splitlines()[0], LoadingBenchmark)
    if options.way:
        worker(options.way, options.model)
    else:
        compare()


def compare() -> None:
    table = Table("processes", "way", "own memory, MB", "with mapped pages, MB", "seconds")
    with tempfile.TemporaryDirectory() as work:
        make_model(Path(work) / "model")
        for processes in (1, 2, 4):
            for way in ("from_pretrained", "ours"):
                rows = measure(processes, way, Path(work) / "model")
                table.add_row(
                    str(processes), way, *(f"{max(row[i] for row in rows):.{d}f}" for i, d in enumerate((0, 0, 1)))
                )
    Console(width=120).print(table)


def make_model(path: Path) -> None:
    sys.path.insert(0, str(TESTS))
    import torch
    from helpers import models
    from transformers import AutoModelForCausalLM

    models.make_model(path, num_key_value_heads=12, head_dim=64, **SIZES)
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)


def measure(processes: int, way: str, model: Path) -> list[list[float]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*command, __file__, way, str(model)], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def worker(way: str, model: str) -> None:
    import torch.distributed as dist
    import transformers.models.llama.modeling_llama  # noqa: F401  imported later it would be counted

    from fastft.common.distributed import join_ranks
    from fastft.config import TrainConfig
    from fastft.model.attention import choose_attention
    from fastft.model.build import make_mesh, prepare_model
    from fastft.model.pretrained import fit_config, load_config

    device = join_ranks()
    config = TrainConfig(model=model, data="", output_dir="", seq_len=512)
    model_config, (attention, _) = fit_config(load_config(model), config, 1), choose_attention("auto", device)
    mesh = make_mesh(device, 1)
    watch = Watch()
    if way == "ours":
        kept = prepare_model(config, model_config, attention, device)
    else:
        kept = whole_then_sharded(model, mesh)
    print(json.dumps(watch.stop()), flush=True)
    dist.barrier()
    del kept
    os._exit(0)


def whole_then_sharded(model: str, mesh):
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for block in causal_lm.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(causal_lm, mesh=mesh)


class Watch:
    """The peaks of this process's memory, which is read every two milliseconds."""

    def __init__(self):
        self.began, self.before = time.perf_counter(), self.memory()
        self.peak, self.over = list(self.before), False
        self.thread = threading.Thread(target=self.look)
        self.thread.start()

    def memory(self) -> tuple[float, float]:
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        kilobytes = {line[0]: int(line[1]) for line in lines if line[0] in ("RssAnon:", "VmRSS:")}
        return kilobytes["RssAnon:"] * 1024 / 1e6, kilobytes["VmRSS:"] * 1024 / 1e6

    def look(self) -> None:
        while not self.over:
            self.peak = [max(pair) for pair in zip(self.peak, self.memory())]
            time.sleep(0.002)

    def stop(self) -> list[float]:
        seconds = time.perf_counter() - self.began
        self.over = True
        self.thread.join()
        return [*(peak - before for peak, before in zip(self.peak, self.before)), seconds]


if __name__ == "__main__":
    sys.exit(run(main))
