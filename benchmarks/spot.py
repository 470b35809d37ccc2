"""Spot machines on paper: how much of the paid time is useful, and Vicuna's bill of 2023 reproduced.

    FASTFT_DATA=DIR python benchmarks/spot.py useful       on the recorded trace DIR/spot/traces/bamboo/a100x1-east1b.txt
    python benchmarks/spot.py vicuna                       7B and 13B on 8 x A100-80GB, under prices of 2023 and the catalog's

useful: the trace is of 64 GCP A100 machines over 27 hours of December 2021, with 154 preemptions in 36 bursts
(uclasystem/bamboo). A machine of ours is preempted as one of these; recovery takes 6 minutes; the job is ten times as long as
the trace. Hourly saves are what is usual elsewhere: the steps wait while the 84 GB of a 7B model are written to disk at 437 MB/s,
and every 10 minutes a copy is uploaded. The other rows are `checkpoint.every: auto`, which is Young's interval for the time that
a save holds up the steps.

vicuna: 70,000 conversations padded to 2,048 tokens, three epochs, as FastChat trained. Only one published figure goes in: 13B
took about a day (20 to 28 hours). With padding counted as work that is an MFU of 0.14 to 0.19, and the same MFU gives the hours
of 7B. The dollars follow, on demand on AWS and GCP, and on GCP's spot machines, preempted as rarely as in the trace above
(10.1 h) or as often as is assumed without one (3 h). Published: 7B $500 and $140, 13B $1,000 and $300.
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fastft.common.command_line import option, parse, run

SHAPES = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40)}  # of LLaMA: hidden, feed-forward, blocks, heads
PUBLISHED = {"7B": (500, 140), "13B": (1000, 300)}  # dollars on demand and on spot; lmsys.org/blog/2023-03-30-vicuna
ABOUT_A_DAY = (20.0, 28.0)
BAMBOO_RATE = 1 / 10.05  # preemptions a node and hour


def useful() -> None:
    from fastft.cost.spot.candidates import PUBLISHED as RATE
    from fastft.cost.spot.simulate import Job, mean_between_preemptions, simulate
    from fastft.cost.spot.traces import read_trace
    from fastft.cost.spot.young import young_interval

    trace = read_trace(Path(os.environ["FASTFT_DATA"]) / "spot/traces/bamboo/a100x1-east1b.txt")
    size = 84e9
    print("machines  save                  every   held    safe after   useful   lost a stop   stops a day")
    for nodes in (1, 2, 8):
        mean = mean_between_preemptions(trace, nodes)
        upload = size / nodes / RATE
        rows = [("hourly, blocking", 3600.0, size / nodes / 437e6, 600.0)]
        for held in (1.0, 2.0, 10.0, 30.0):
            rows.append((f"auto, held {held:g} s", young_interval(held, mean, upload), held, upload))
        for name, interval, held, safe in rows:
            job = Job(
                work_s=10 * trace.end_s,
                nodes=nodes,
                recovery_s=360,
                blocking_s=held,
                upload_s=safe,
                interval_s=interval,
            )
            runs = simulate(job, trace, runs=200)
            share = float(np.mean(job.work_s / 3600 / runs.paid_hours))
            lost = float(runs.lost_s.sum() / runs.preemptions.sum())
            stops = float(np.mean(24 * runs.preemptions / runs.hours))
            saves = f"{nodes:8}  {name:18} {interval:7.0f} s  {held:4.0f} s  {safe:8.0f} s"
            print(f"{saves}  {share:8.1%}  {lost:8.0f} s  {stops:10.1f}")


def vicuna() -> None:
    from fastft.config import TrainConfig
    from fastft.cost.estimate import assumed_work, estimates
    from fastft.cost.gpus import GPUS
    from fastft.cost.memory import checkpoint_bytes
    from fastft.cost.shape import load_shape
    from fastft.cost.spot.candidates import SpotConfig, compare
    from fastft.cost.spot.prices import read_prices
    from fastft.model.pretrained import load_config

    shapes = {}
    with tempfile.TemporaryDirectory() as home:
        for name, sizes in SHAPES.items():
            path = make_config(Path(home) / name, *sizes)
            shapes[name] = load_shape(load_config(path), name)
    config = TrainConfig(model="llama", output_dir="none", data="none", global_batch_size=128)
    work = assumed_work(config, 70_000 * config.seq_len)

    def hours(name: str, mfu: float):
        return estimates(config, shapes[name], work, [GPUS["A100-80GB"]], [8], mfu)

    whole = hours("13B", 1.0)[0].hours
    efficiencies = [whole / day for day in ABOUT_A_DAY]

    def bill(name: str, mfu: float, prices: str, rate: float) -> dict[bool, list[float]]:
        """Median dollars of AWS and GCP by spot or not."""
        spot = SpotConfig(spot=True, prices=prices, preemption_rate=rate)
        size = checkpoint_bytes(shapes[name], config)
        rows = compare(hours(name, mfu), read_prices(prices), spot.preemptions(0), size, spot).candidates
        rows = [row for row in rows if row.offer.cloud in ("aws", "gcp")]
        return {kind: [row.dollars[0] for row in rows if row.spot is kind] for kind in (False, True)}

    for name, (on_demand, on_spot) in PUBLISHED.items():
        took = [hours(name, mfu)[0].hours for mfu in efficiencies]
        print(
            f"{name}: {took[0]:.1f} to {took[1]:.1f} hours at an MFU of {efficiencies[0]:.3f} to {efficiencies[1]:.3f}"
        )
        for prices in ("2023", "v8"):
            low, high = bill(name, efficiencies[0], prices, BAMBOO_RATE), bill(name, efficiencies[1], prices, 1 / 3)
            for kind, published in ((False, on_demand), (True, on_spot)):
                least, most = min(low[kind]), max(high[kind])
                line = f"  prices {prices:4}, {'spot     ' if kind else 'on demand'}: ${least:6.0f} to ${most:6.0f}"
                if prices == "2023":
                    line += f"; published ${published}: {'inside' if least <= published <= most else 'OUTSIDE'}"
                print(line)
        packed, fast = bill(name, 0.4, "v8", 1 / 3), hours(name, 0.4)[0].hours
        print(
            f"  prices v8, as many tokens at an MFU of 0.4, {fast:.1f} hours: spot ${min(packed[True]):.0f}, on demand "
            f"${min(packed[False]):.0f}"
        )


def make_config(path: Path, hidden: int, mlp: int, blocks: int, heads: int) -> str:
    from transformers import AutoConfig

    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": blocks, "num_attention_heads": heads}
    AutoConfig.for_model("llama", vocab_size=32000, max_position_embeddings=2048, **sizes).save_pretrained(path)
    return str(path)


@dataclass
class SpotBenchmarkConfig:
    """Which of the two."""

    what: Literal["useful", "vicuna"] = option(positional=True)
    """useful: the share of the paid time on a recorded trace. vicuna: the bill of 2023."""


def main() -> None:
    [options] = parse(sys.argv[1:], "benchmarks/spot.py", __doc__.splitlines()[0], SpotBenchmarkConfig)
    {"useful": useful, "vicuna": vicuna}[options.what]()


if __name__ == "__main__":
    raise SystemExit(run(main))
