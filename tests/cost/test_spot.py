"""fastft.cost.spot: prices and their doubts, formats of traces, the simulation against arithmetic, `fastft estimate --spot`."""

import json
import math
import os
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastft.cli import main
from fastft.cost.spot.candidates import SpotConfig, compare
from fastft.cost.spot.prices import Offer, cheapest, read_prices
from fastft.cost.spot.simulate import Job, mean_between_preemptions, simulate, survival, undisturbed
from fastft.cost.spot.traces import Trace, fit, read_trace, synthetic
from fastft.cost.spot.young import young_interval
from fastft.errors import UserError

DATA = Path(os.environ.get("FASTFT_DATA") or "nowhere")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="FASTFT_DATA names no directory with recorded traces")
OWN = "cloud,gpu,count,region,on_demand,spot\n"

# Young's interval ------------------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 1e3), st.floats(60, 1e6), st.floats(0, 1e4))
def test_young_is_the_cheapest_interval(blocking, mean, upload):
    """Saves cost blocking / interval, lost work interval / 2 a preemption: no other interval above the upload is better."""
    chosen = young_interval(blocking, mean, upload)
    assert chosen >= upload

    def cost(interval):
        return blocking / interval + interval / (2 * mean)

    assert all(cost(chosen) <= cost(max(chosen * factor, upload)) * (1 + 1e-9) for factor in (0.25, 0.9, 1.1, 4))


@pytest.mark.parametrize("times", [(-1, 1, 0), (1, 0, 0), (1, -1, 0), (1, math.inf, 0), (math.nan, 1, 0), (1, 1, -1)])
def test_young_refuses_what_is_no_time(times):
    with pytest.raises(ValueError, match="is not a time in seconds"):
        young_interval(*times)


# Prices ----------------------------------------------------------------------------------------------------------------------


def test_the_shipped_catalogs():
    offers = read_prices("v8")
    assert cheapest(offers, "A100-80GB", 8, "aws", spot=True).region == "euc1-az2"
    assert cheapest(offers, "A100-80GB", 8, "gcp", spot=False).on_demand == 44.19  # not the 23.57 that stand there, too
    assert cheapest(offers, "A100-80GB", 8, "lambda", spot=True) is None
    assert cheapest(read_prices("2023"), "A100-80GB", 8, "gcp", spot=True).spot == 12.07


def test_each_rule_doubts_its_row_and_the_cheapest_believed_price_wins(tmp_path):
    rows = ["a,10,4", "b,10,4.2", "c,3,4", "d,10,10", "e,10,1", "f,5,4"]
    (tmp_path / "own.csv").write_text("# mine\n" + OWN + "".join(f"aws,H100,8,{row}\n" for row in rows))
    offers = {o.region: o for o in read_prices(str(tmp_path / "own.csv"))}
    assert {r for r, o in offers.items() if o.on_demand_doubt} == {"c", "f"}
    assert {r for r, o in offers.items() if o.spot_doubt} == {"d", "e"}
    assert "below spot" in offers["c"].on_demand_doubt and "another region" in offers["f"].on_demand_doubt
    assert "no discount" in offers["d"].spot_doubt and "half the median" in offers["e"].spot_doubt
    best = cheapest(offers.values(), "H100-80GB", 8, "aws", spot=True)
    assert best.spot == 4 and cheapest(offers.values(), "H100-80GB", 8, "aws", spot=False).on_demand == 10


@pytest.mark.parametrize(
    ("places", "needs"),
    [
        (
            [
                "use1-az4",
                "us-east-1a",
                "us-east-1",
                "apse2-az1",
                "cac1-az2",
                "usge1-az1",
                "all",
                "here",
                "room1",
                "my-room-1",
                "",
            ],
            "",
        ),
        # Of the 17 regions that are on.
        (["ap-northeast-3", "apne3-az1", "us-west-1", "euc1-az2", "sa-east-1", "aps1-az1"], ""),
        (["use1-atl2-az1", "us-east-1-atl-2a", "usw2-lax1-az1", "us-west-2-lax-1b"], "a Local Zone"),
        (["use1-wl1-bos-wlz1", "us-east-1-wl1-bos-wlz-1", "eu-west-2-wl1-lon-wlz-1"], "a Wavelength Zone"),
        (["eus2-az2", "eu-south-2", "eu-south-2a", "apse3-az1", "ap-southeast-3", "ilc1-az1", "caw1-az1"], "a region"),
        (["eu-central-3", "euc3-az1", "br-south-1"], "a region"),  # those that are yet to come
    ],
)
def test_what_an_account_has_to_turn_on_first(places, needs):
    assert {place: Offer("aws", "H100-80GB", 8, place, 55.0, 10.0).opt_in for place in places} == dict.fromkeys(
        places, needs
    )
    assert not Offer("gcp", "H100-80GB", 8, places[0], 55.0, 10.0).opt_in


def test_skypilots_catalog_is_read_with_gcps_hosts_joined(tmp_path):
    """AWS's rows as they are; GCP's GPUs with the machine they are attached to, doubted where the GPUs alone give reason."""
    catalog = Path(__file__).parents[1] / "sky" / "catalog"
    offers = read_prices(f"{catalog / 'aws' / 'vms.csv'},{catalog / 'gcp' / 'vms.csv'}")
    assert cheapest(offers, "A100-80GB", 8, "aws", spot=True).spot == 8.6505
    assert cheapest(offers, "H100-80GB", 8, "gcp", spot=True).spot == pytest.approx(17.8848 + 2.15966)
    (tmp_path / "gcp_some.csv").write_text(
        "AcceleratorName,AcceleratorCount,HostInstanceType,Region,AvailabilityZone,GpuPrice,GpuSpotPrice,HostPrice,HostSpotPrice\n"
        "A100-80GB,8,a2-ultragpu-8g,us-central1,us-central1-a,14.77,15.71,8.80,4.40\n"
    )
    (offer,) = read_prices(str(tmp_path / "gcp_some.csv"))
    assert offer.spot == pytest.approx(20.11) and "of the GPUs alone" in offer.on_demand_doubt


def test_shares_of_a_gpu_and_gpus_without_a_machine_are_no_offers(tmp_path):
    rows = "x,A10G,0.5,1,1,here\ny,A10G,1,1,1,here\n,A100,8,1,1,here\nz,T4,1,1,1,here\n"
    write(tmp_path / "aws_vms.csv", "InstanceType,AcceleratorName,AcceleratorCount,Price,SpotPrice,Region\n" + rows)
    (offer,) = read_prices(str(tmp_path / "aws_vms.csv"))
    assert (offer.gpu, offer.count, offer.region) == ("A10G", 1, "here")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("own.csv", "a,b\n1,2\n", "has columns a, b; expected those of"),
        ("own.csv", "", "has columns none"),
        ("own.csv", OWN + "aws,H300,8,x,1,1\n", "row 1: no GPU 'H300' is known"),
        ("own.csv", OWN + "aws,H100,8,x,cheap,1\n", "row 1: 'cheap' is no price"),
        ("own.csv", OWN + "aws,H100,0.5,x,1,1\n", "row 1: '0.5' is no number of GPUs"),
        ("own.csv", OWN + "aws,H100,8\n", "nothing"),
        ("own.csv", OWN, "has no price of a GPU among"),
        ("own.csv", b"\xff\xfe\x00", "is no CSV"),
        (
            "vms.csv",
            "InstanceType,AcceleratorName,AcceleratorCount,Price,SpotPrice,Region\nx,H100,8,1,1,y\n",
            "which cloud?",
        ),
    ],
)
def test_broken_prices_are_one_line(tmp_path, name, text, said):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    if said == "nothing":  # a short row has empty prices
        assert read_prices(str(tmp_path / name))[0].on_demand is None
        return
    with pytest.raises(UserError, match="prices: ") as raised:
        read_prices(str(tmp_path / name))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_missing_prices_name_the_shipped_catalogs():
    with pytest.raises(UserError, match="no such file; 2023, v8 come with fastft"):
        read_prices("nowhere.csv")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# Traces ----------------------------------------------------------------------------------------------------------------------


def test_both_formats_of_traces_are_read(tmp_path):
    ticks = {"metadata": {"gap_seconds": 600}, "data": [1, 1, 0, 0, 1], "prices": [1, 2]}
    trace = read_trace(write(tmp_path / "ticks.json", json.dumps(ticks)))
    assert (trace.times.tolist(), trace.counts.tolist(), trace.end_s) == ([0, 1200, 2400], [1, 0, 1], 3000)
    lines = "2021-12-11, 23:59:00, 3\n2021-12-12, 00:00:00, 3\n2021-12-12, 00:01:00, 1\n2021-12-12, 00:11:00, 2\n"
    trace = read_trace(write(tmp_path / "bamboo.txt", lines))
    assert (trace.times.tolist(), trace.counts.tolist(), trace.end_s) == ([0, 120], [3, 1], 720)
    rate, burst = fit(trace)
    assert rate == pytest.approx(2 / ((3 * 120 + 600) / 3600)) and burst == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected at least two lines"),
        ("hello", "has no known format"),
        ("{}", "has no known format"),
        ('{"metadata": {"gap_seconds": 60}', "has no known format"),
        ('{"metadata": {"gap_seconds": 0}, "data": [1, 0]}', "gap_seconds 0 is not a time"),
        ('{"metadata": {"gap_seconds": 60}, "data": [1, "x"]}', "data is not a list"),
        ('{"metadata": {"gap_seconds": 60}, "data": [[1], [2, 3]]}', "has no known format"),
        ('{"metadata": {"gap_seconds": 60}, "data": [0, 0, 0]}', "has no instance at any time"),
        ("2021-12-11, 11:11:30, 5\n2021-12-11, 11:11:00, 5\n", "in order of time"),
        ("2021-12-11, 11:11:30, x\n", "has no known format"),
    ],
)
def test_broken_traces_are_one_line(tmp_path, text, said):
    with pytest.raises(UserError, match="trace: ") as raised:
        read_trace(write(tmp_path / "trace", text))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_trace_is_one_line():
    with pytest.raises(UserError, match="no such file"):
        read_trace("nowhere.json")


@given(st.floats(0.02, 1), st.floats(1, 8), st.integers(0, 5))
def test_a_synthetic_trace_has_the_rate_it_was_made_for(rate, burst, seed):
    trace = synthetic(rate, burst, hours=2000 / rate / 64 * burst, seed=seed)  # about 2,000 bursts
    assert trace.counts.min() >= 0 and trace.most <= 64 and (np.diff(trace.times) >= 0).all()
    assert fit(trace)[0] == pytest.approx(rate, rel=0.2)


@needs_data
def test_the_recorded_traces():
    bamboo = read_trace(DATA / "spot/traces/bamboo/a100x1-east1b.txt")
    rate, burst = fit(bamboo)
    assert bamboo.most == 64 and 1 / rate == pytest.approx(10.1, abs=0.1) and burst == pytest.approx(154 / 36)
    for path in (DATA / "spot/traces").rglob("*.json"):
        assert read_trace(path).most == 1


# The simulation --------------------------------------------------------------------------------------------------------------

JOB = Job(work_s=36000, nodes=1, recovery_s=300, blocking_s=10, upload_s=30, interval_s=600)
jobs = st.builds(
    Job,
    work_s=st.floats(60, 1e5),
    nodes=st.integers(1, 4),
    recovery_s=st.floats(0, 900),
    blocking_s=st.floats(0, 60),
    upload_s=st.floats(0, 300),
    interval_s=st.floats(60, 7200),
    notice_s=st.sampled_from([0.0, 30.0, 120.0]),
)


def test_machines_that_stay():
    assert undisturbed(JOB).hours[0] * 3600 == pytest.approx(300 + 36000 + 60 * 10 + 30)
    calm = Trace("calm", np.array([0.0]), np.array([1]), 600.0)
    assert simulate(JOB, calm, runs=3).hours == pytest.approx(undisturbed(JOB).hours[0])


def test_a_loss_by_hand():
    """One node, gone at 1,000 s of every 2,000 s for 500 s: each start makes 700 s, of which one interval is safe."""
    trace = Trace("by hand", np.array([0.0, 1000.0, 1500.0]), np.array([1, 0, 1]), 2000.0)
    assert JOB.reached_s(0.0, 700.0) == (600.0, pytest.approx(90.0))
    assert JOB.reached_s(0.0, 639.0) == (0.0, pytest.approx(629.0)), "saved, but not yet uploaded"
    assert replace(JOB, notice_s=120.0).reached_s(0.0, 700.0) == (pytest.approx(580.0), 0.0)
    assert replace(JOB, notice_s=30.0).reached_s(0.0, 700.0) == (600.0, pytest.approx(90.0)), "too short for a save"
    runs = simulate(JOB, trace, runs=20)
    assert (runs.preemptions > 0).all() and np.isfinite(runs.hours).all()
    assert (runs.hours >= runs.paid_hours).all()


@given(st.integers(0, 5000), st.integers(60, 600), st.integers(0, 20), st.integers(0, 3000))
def test_uploads_come_one_at_a_time(lasted, interval, blocking, upload):
    """As the trainer's uploader has it, told step by step: the newest save that there is, as soon as the last one is safe."""
    job = replace(JOB, interval_s=interval, blocking_s=blocking, upload_s=upload)
    cycle, free, safe = interval + blocking, 0, 0
    while True:
        begins = max(free, (safe + 1) * cycle)  # when there is a newer save than the last one
        free = begins + upload
        if free > lasted:
            break
        safe = begins // cycle
    assert job.reached_s(0.0, lasted + 0.5)[0] == min(safe * interval, job.work_s)


@settings(max_examples=40)
@given(jobs, st.floats(0, 1), st.integers(0, 3))
def test_nothing_is_free(job, rate, seed):
    """Paid time holds all work, all lost work and a recovery; without preemptions there is no more than saves."""
    runs = simulate(job, synthetic(rate, seed=seed, hours=48), runs=3, seed=seed)
    ended = np.isfinite(runs.hours)
    assert (3600 * runs.paid_hours[ended] + 1e-3 >= job.work_s + runs.lost_s[ended] + job.recovery_s).all()
    assert (runs.hours + 1e-9 >= runs.paid_hours)[ended].all()
    assert (runs.lost_s[runs.preemptions == 0] == 0).all()
    cycle = job.interval_s + job.blocking_s
    # One upload, and what it had to wait for: the one before it, or a save.
    unsafe = job.upload_s + max(job.upload_s, cycle)
    assert (runs.lost_s <= runs.preemptions * (unsafe + cycle * (job.upload_s > cycle)) + 1e-3).all()


@given(st.integers(1, 20), st.integers(0, 20), st.integers(1, 20))
def test_survival_is_the_share_of_draws_without_us(before, lost, nodes):
    assume(lost <= before and nodes <= before)
    expected = math.comb(before - nodes, lost) / math.comb(before, lost) if lost <= before - nodes else 0
    assert survival(before, before - lost, nodes) == pytest.approx(expected)


def test_a_gang_is_lost_more_often_and_bursts_are_kinder_to_it():
    alone, gang, burst = (
        mean_between_preemptions(synthetic(0.2, burst, hours=2000), nodes) for nodes, burst in ((1, 1), (8, 1), (8, 8))
    )
    assert gang == pytest.approx(alone / 8, rel=0.1) and burst > 1.5 * gang


def test_a_trace_of_one_node_stands_for_several():
    trace = Trace("one", np.array([0.0, 5000.0, 5600.0]), np.array([1, 0, 1]), 20000.0)
    job = replace(JOB, nodes=3)
    runs = simulate(job, trace, runs=20)
    assert np.isfinite(runs.hours).all() and runs.preemptions.mean() > simulate(JOB, trace, runs=20).preemptions.mean()


def test_what_never_ends_is_inf():
    """Where a node never lasts long enough for one save, no work is ever safe."""
    trace = Trace("flicker", np.array([0.0, 310.0]), np.array([1, 0]), 400.0)
    assert np.isinf(simulate(JOB, trace, runs=3).hours).all()


# The command -----------------------------------------------------------------------------------------------------------------


def arguments(model: Path, *more: str) -> list[str]:
    return [
        "estimate", "--model", str(model), "--tokens", "100000000000", "--seq_len", "160",
        "--counts", "8,16", "--gpus", "H100-80GB", *more,
    ]  # fmt: skip


def test_the_command_prints_the_cheapest_first_and_writes_a_page(model, tmp_path, capsys):
    """Cheapest first; a flag alone; doubts, what is left out and assumptions said; the page whole and escaped."""
    page = tmp_path / "page.html"
    own = write(tmp_path / "own.csv", OWN + 'aws,H100,8,"<b>here</b>",55,10\ngcp,H100,8,there,80,80\n')
    options = ["--prices", str(own), "--preemption_rate", "0.2", "--page", str(page), "--global_batch_size", "32"]
    assert main(arguments(model, "--spot", *options)) == 0
    out = capsys.readouterr().out
    assert "Cheapest: 1 x 8 H100-80GB, aws, spot" in out and "Not believed: gcp H100-80GB in there: spot $80.00" in out
    assert out.index("2 x 8 H100-80GB") > out.index("1 x 8 H100-80GB") and "Young's interval" in out
    text = page.read_text()
    assert "&lt;b&gt;here&lt;/b&gt;" in text and "<b>here" not in text and "How often to save" in text


def test_what_needs_an_opt_in_is_chosen_only_where_asked(model, tmp_path, capsys):
    """It is said in both cases, in the terminal and on the page."""
    rows = "aws,H100,8,use1-atl2-az1,55,10\naws,H100,8,use2-az1,55,12\naws,H100,8,eu-south-2,55,2\n"
    page, own = tmp_path / "page.html", write(tmp_path / "own.csv", OWN + rows)
    options = ["--spot", "--prices", str(own), "--page", str(page), "--global_batch_size", "32"]
    assert main(arguments(model, *options)) == 0
    out, text = capsys.readouterr().out, page.read_text()
    assert "spot (use2-az1): $" in out and "(opt-in)" not in out and "(opt-in)" not in text
    said = (
        "aws H100-80GB in use1-atl2-az1: a Local Zone that the account has to turn on; spot $10.00, on demand $55.00."
    )
    assert f"Needs an opt-in, not chosen without --opt_in_zones: {said}" in out
    assert "Needs an opt-in, not chosen without --opt_in_zones</h2>" in text and "aws H100-80GB, use1-atl2-az1" in text
    assert main(arguments(model, *options, "--opt_in_zones")) == 0
    out, text = capsys.readouterr().out, page.read_text()
    assert "spot (use1-atl2-az1, needs an opt-in): $" in out and "aws use1-atl2-az1 (opt-in)" in out
    assert "Not believed: aws H100-80GB in eu-south-2" in out  # a doubted price is not chosen, either
    assert "aws, use1-atl2-az1 (opt-in)" in text and "<h2>Needs an opt-in</h2>" in text


def test_only_offers_that_need_an_opt_in(model, tmp_path, capsys):
    own = write(tmp_path / "own.csv", OWN + "aws,H100,8,eu-south-2,55,10\n")
    assert main(arguments(model, "--spot", "--prices", str(own), "--global_batch_size", "32")) == 1
    assert "no price that may be chosen" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_numbers(model, capsys):
    for seed in ("1", "1", "2"):
        assert main(arguments(model, "--spot", "--global_batch_size", "32", "--seed", seed)) == 0
    first, second, other = capsys.readouterr().out.split(f"{model}: ")[1:]
    assert first == second != other


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--trace", "x.json"], "trace: only with --spot"),
        (["--burst", "2"], "burst: only with --spot"),
        (["--opt_in_zones"], "opt_in_zones: only with --spot"),
        (["--spot", "--trace", "nowhere.json"], "trace: nowhere.json: no such file"),
        (["--spot", "--trace", "x", "--preemption_rate", "1"], "preemption_rate: the trace has a rate of its own"),
        (["--spot", "--preemption_rate", "-1"], "preemption_rate: -1.0 is not 0 or more"),
        (["--spot", "--preemption_rate", "1000"], "preemption_rate: 1000.0 is not between 0 and 60 a node and hour"),
        (["--spot", "--trace", "/"], "trace: /: Is a directory"),
        (["--spot", "--prices", "/"], "prices: /: Is a directory"),
        (["--spot", "--page", "/nowhere/x.html"], "page: /nowhere/x.html: cannot be written"),
        (["--spot", "--burst", "0.5"], "burst: 0.5 is not between 1 and 64"),
        (["--spot", "--prices", "nowhere.csv"], "prices: nowhere.csv: no such file"),
        (
            ["--spot", "--prices", "2023"],
            "spot: nothing to compare; no such machine, or no price that may be chosen: 8 x H100-80GB",
        ),
        (["--spot", "--checkpoint_every", "often"], "checkpoint_every: 'often' is neither auto nor minutes"),
        (["--spot", "--checkpoint_every", "0"], "checkpoint_every: '0' is neither"),
    ],
)
def test_mistakes_are_one_line(model, capsys, more, said):
    assert main(arguments(model, "--global_batch_size", "32", *more)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {said}") and captured.err.count("\n") == 1, captured


@pytest.mark.parametrize(("key", "value"), [("preemption_rate", "nan"), ("setup_minutes", "inf"), ("burst", "two")])
def test_what_is_no_number_is_a_wrong_command(model, capsys, key, value):
    assert main(arguments(model, "--spot", f"--{key}", value)) == 2
    assert capsys.readouterr().err == f"error: {key}: expected a number, got {value!r}\n"


def test_without_preemptions_spot_costs_its_price(model):
    """The arithmetic of a row: hours of the estimate and of its saves, dollars of the offer."""
    from fastft.config import TrainConfig
    from fastft.cost.estimate import assumed_work, estimates
    from fastft.cost.gpus import GPUS
    from fastft.cost.memory import checkpoint_bytes
    from fastft.cost.shape import load_shape
    from fastft.model.pretrained import load_config

    config = TrainConfig(model=str(model), output_dir="none", data="none", seq_len=160)
    shape = load_shape(load_config(str(model)), str(model))
    assert checkpoint_bytes(shape, config) == 12 * shape.parameters
    found = estimates(config, shape, assumed_work(config, 10**12), [GPUS["A100-80GB"]], [8], 0.4)
    spot = SpotConfig(spot=True, preemption_rate=0.0, checkpoint_every="10", blocking_seconds=6.0, upload_seconds=60.0)
    rows = compare(found, read_prices("2023"), spot.preemptions(0), checkpoint_bytes(shape, config), spot).candidates
    best = rows[0]
    hours = 0.1 + found[0].hours + math.ceil(found[0].hours * 6) * 6 / 3600 + 60 / 3600
    assert best.kind == "spot" and best.hours == pytest.approx((hours, hours))
    assert best.dollars == pytest.approx((12.07 * hours,) * 2)
    assert [row.offer.cloud for row in rows] == ["gcp", "azure", "gcp", "aws"]


def test_vicunas_bill_is_between_the_ends_of_the_estimate(capsys):
    """Hours and prices of 2023 have what was published between their ends, on demand and on spot."""
    runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "spot.py"))["vicuna"]()
    out = capsys.readouterr().out
    assert out.count(": inside") == 4 and "OUTSIDE" not in out, out
