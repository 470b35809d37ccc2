"""`fastft estimate`: its arithmetic against the plan of the run itself, its table, and mistakes in one line each."""

import os
import socket
import subprocess
import sys
import threading

import pytest
import yaml

from fastft.cli import main
from fastft.config import LoraConfig, TrainConfig
from fastft.cost.estimate import RESERVED, Work, assumed_work, choose, estimates, planned_work
from fastft.cost.flops import training_flops
from fastft.cost.gpus import GPUS, TABLE, find_gpu, peak_flops
from fastft.cost.memory import GIB
from fastft.cost.shape import load_shape
from fastft.cost.spot.prices import KINDS
from fastft.data.dataset import tokenized
from fastft.data.step_plan import StepPlan
from fastft.data.template.chat_template import load_template
from fastft.model.pretrained import load_config


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory):
    """A directory with the config of Llama-2-7B, without weights."""
    from transformers import AutoConfig

    path = tmp_path_factory.mktemp("llama_7b")
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    AutoConfig.for_model("llama", vocab_size=32000, max_position_embeddings=4096, **sizes).save_pretrained(path)
    return path


@pytest.fixture
def http_hub():
    """An endpoint that answers every request with 404, as the Hub does for a repository that it does not have."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Nothing(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Nothing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def config(ground, **options) -> TrainConfig:
    values = {"model": str(ground / "model"), "output_dir": "none", "data": str(ground / "data.jsonl"), "seq_len": 160}
    return TrainConfig(**{**values, **options})


def table(capsys, *arguments: str) -> list[list[str]]:
    """The cells of the rows about GPUs."""
    assert main(["estimate", *arguments]) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    return [row for row in rows if row[0] in GPUS]


def test_the_work_is_that_of_the_plan(ground):
    """Epochs of every conversation once, and the first steps of an epoch where max_steps cuts it."""
    data = tokenized(str(ground / "data.jsonl"), load_template(str(ground / "model")))
    keep = data.trained_counts > 0
    lengths, trained = data.lengths[keep], data.trained_counts[keep]
    work, words = planned_work(config(ground, epochs=2, global_batch_size=4))
    assert work.tokens == 2 * lengths.sum() and work.trained == 2 * trained.sum()
    assert work.squared_lengths == 2 * (lengths**2).sum() and words == len(
        load_template(str(ground / "model")).tokenizer
    )
    cut, _ = planned_work(config(ground, epochs=2, global_batch_size=4, max_steps=2))
    rows = StepPlan(data.select(keep.nonzero()[0]), 160, 0, 2, 4, 2).rows(0)[:8]
    assert cut.steps == 2 and cut.tokens == sum(int(lengths[row].sum()) for row in rows) < work.tokens


def test_without_data_the_work_is_that_of_full_rows(ground):
    assert assumed_work(config(ground, epochs=3, global_batch_size=2), 1000) == Work(12, 3000, 3000, 3000 * 160)
    assert assumed_work(config(ground, epochs=3, global_batch_size=2, max_steps=5), 1000).tokens == 5 * 320


def test_an_estimate_can_be_followed_by_hand(ground, llama_7b):
    shape = load_shape(load_config(str(llama_7b)), "7b")
    work = Work(steps=10, tokens=10**9, trained=6 * 10**8, squared_lengths=10**12)
    run = config(ground, seq_len=2048)
    gpus = [GPUS["H100-80GB"], GPUS["A10G"]]
    found = estimates(run, shape, work, gpus, [1, 8, 7], 0.5, {"H100-80GB": 2.5})
    one, eight, seven, *small = found
    body = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    flops = training_flops(10**9, 6 * 10**8, 10**12, 6 * body, 6 * 32000 * 4096, 32, 4096)
    assert one.flops == flops and one.hours == pytest.approx(flops / (0.5 * 989e12) / 3600)
    assert one.tokens_per_s == pytest.approx(10**9 / (one.hours * 3600))
    assert one.kwh == pytest.approx(0.7 * one.hours) and one.dollars == pytest.approx(2.5 * one.hours)
    assert eight.hours == pytest.approx(one.hours / 8) and eight.kwh == pytest.approx(one.kwh)
    assert (one.fits, eight.fits, small[0].fits) == ("no", "yes", "no") and small[0].dollars is None
    assert seven.fits == "no: global_batch_size" and seven.memory is None
    assert choose(found) is eight and choose([one]) is None
    assert one.memory.total > GPUS["H100-80GB"].gib * GIB - RESERVED > 1.1 * eight.memory.total


def test_adapters_over_frozen_weights_cost_two_thirds_and_windows_less(ground, llama_7b):
    shape = load_shape(load_config(str(llama_7b)), "7b")
    hours = lambda lora, work: estimates(config(ground, lora=LoraConfig(r=lora)), shape, work, [GPUS["H200"]], [8], 0.5)  # noqa: E731
    work = Work(steps=10, tokens=10**9, trained=10**9, squared_lengths=0)
    assert hours(16, work)[0].flops / hours(0, work)[0].flops == pytest.approx(2 / 3, rel=0.01)
    longer = config(ground, seq_len=8192, global_batch_size=1)
    full, sliding = (assumed_work(longer, 8192, windows).squared_lengths / 3 for windows in ([None], [4096]))
    assert full == 8192**2 and sliding == 8192**2 - 4096**2


def test_a_gpu_is_found_by_every_spelling():
    """A kind is found by its name, by what its name begins with, and as drivers and catalogs spell it."""
    spelled = {
        "H100-80GB": ["H100", "h100", "H100-80GB", "H100 80GB", "H100-SXM", "NVIDIA H100 80GB HBM3"],
        "A100-80GB": ["A100-80GB", "a100_80gb", "NVIDIA A100-SXM4-80GB"],
        "RTX-4090": ["RTX-4090", "RTX4090", "4090", "NVIDIA GeForce RTX 4090"],
    }
    for name, spellings in spelled.items():
        assert {find_gpu("gpus", spelling).name for spelling in spellings} == {name}
    assert all(peak_flops(gpu.device) == gpu.bf16_flops for gpu in TABLE)
    assert KINDS["A100"] == "A100-40GB" and set(KINDS.values()) == set(GPUS)


def test_the_command_with_data(ground, capsys):
    flags = ["--model", str(ground / "model"), "--data", str(ground / "data.jsonl"), "--seq_len", "160"]
    rows = table(capsys, *flags, "--gpus", "H200,l40s,L40S", "--counts", "1,8", "--price_per_gpu", "2")
    assert [row[:2] for row in rows] == [["H200", "1"], ["H200", "8"], ["L40S", "1"], ["L40S", "8"]]
    assert all(row[4] == "yes" and len(row) == 9 for row in rows)


def test_the_command_without_data(llama_7b, tmp_path, capsys):
    """--tokens stands for data, also for the stages of a YAML file; prices by kind; all kinds by default."""
    run = {"model": str(llama_7b), "stages": [{"data": "nowhere.jsonl"}], "global_batch_size": 64}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    prices = ["--price_per_gpu", "H200=3,A10G=1"]
    rows = table(capsys, "--config", str(tmp_path / "run.yaml"), "--tokens", "1000000", *prices)
    (tmp_path / "tokens.yaml").write_text(yaml.safe_dump({**run, "tokens": 1000000}))
    assert table(capsys, "--config", str(tmp_path / "tokens.yaml"), *prices) == rows
    assert {row[0] for row in rows} == set(GPUS) and {row[1] for row in rows} == {"1", "2", "4", "8"}
    assert {row[0] for row in rows if row[-1] != "-"} == {"H200", "A10G"}
    assert rows[0][2:5] == ["103.9", "39", "no"]


def test_where_nothing_fits_it_says_what_helps(llama_7b, capsys):
    assert main(["estimate", "--model", str(llama_7b), "--tokens", "1000", "--gpus", "A10G", "--counts", "1,2"]) == 0
    out = capsys.readouterr().out
    assert "Nothing fits. 2 x A10G lacks least" in out and "--offload true: " in out and "4 GPUs: " in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "no/such-model"], "no/such-model: the model's config cannot be read"),
        (["--model", "./nowhere"], "./nowhere: no such directory"),
        (["--gpus", "H300"], "gpus: no GPU 'H300' is known; known are A100-40GB, "),
        (["--gpus", "A100"], "gpus: 'A100' may mean A100-40GB or A100-80GB; say which"),
        (["--gpus", "L4"], "gpus: no GPU 'L4' is known"),
        (["--gpus", ","], "gpus: names no GPU"),
        (["--mfu", "0"], "mfu: 0.0 is not above 0 and at most 1"),
        (["--mfu", "1.5"], "mfu: 1.5 is not"),
        (["--counts", "0"], "counts: '0' is not a list of numbers from 1 on"),
        (["--counts", "1,x"], "counts: '1,x' is not"),
        (["--counts", ""], "counts: '' is not"),
        (["--counts", "3,7"], "counts: none of these numbers"),
        (["--tokens", "0"], "tokens: 0 is not 1 or more"),
        (["--price_per_gpu", "H100-80GB=dear"], "price_per_gpu: 'H100-80GB=dear' is neither a price"),
        (["--price_per_gpu", "H300=1"], "price_per_gpu: no GPU 'H300' is known"),
        (["--price_per_gpu", "A100=1"], "price_per_gpu: 'A100' may mean A100-40GB or A100-80GB"),
        (["--price_per_gpu", "H100=nan"], "price_per_gpu: 'H100=nan' is neither a price"),
        (["--seq_len", "0"], "seq_len: 0 is not 1 or more"),
    ],
)
def test_mistakes_are_one_line(llama_7b, capsys, arguments, said):
    assert main(["estimate", "--model", str(llama_7b), "--tokens", "1000", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured
    assert captured.err.startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seq_lenn", "1"], "unknown key 'seq_lenn'; the nearest valid one is 'seq_len'"),
        (["--mfuu", "1"], "unknown key 'mfuu'; the nearest valid one is 'mfu'"),
        (["--tokenss", "1"], "unknown key 'tokenss'; the nearest valid one is 'tokens'"),
        (["--mfu", "fast"], "mfu: expected a number, got 'fast'"),
        (["--mfu", "nan"], "mfu: expected a number, got 'nan'"),
    ],
)
def test_a_wrong_command_names_the_nearest_key(llama_7b, capsys, arguments, said):
    assert main(["estimate", "--model", str(llama_7b), *arguments]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_without_data_it_asks_for_some(llama_7b, capsys):
    assert main(["estimate", "--model", str(llama_7b)]) == 1
    assert capsys.readouterr().err.endswith("without any yet, say --tokens 10000000\n")


def test_help_lists_both_kinds_of_keys(capsys):
    with pytest.raises(SystemExit):
        main(["estimate", "--help"])
    out = capsys.readouterr().out
    assert "--price_per_gpu" in out and "--seq_len" in out and all(name in out for name in GPUS)


def test_the_printed_config_gives_the_same_estimate(llama_7b, tmp_path, capsys):
    flags = ["--model", str(llama_7b), "--tokens", "1000", "--gpus", "H100", "--counts", "8", "--seq_len", "512"]
    with pytest.raises(SystemExit):
        main(["estimate", *flags, "--print_config"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["tokens"] == 1000
    (tmp_path / "estimate.yaml").write_text(printed)
    assert table(capsys, "--config", str(tmp_path / "estimate.yaml")) == table(capsys, *flags)


# The Hub -------------------------------------------------------------------------------------------------------------------


def from_the_hub(tmp_path, endpoint: str) -> subprocess.CompletedProcess:
    """An estimate for a name on the Hub, whose place `endpoint` takes; it may ask there, and its cache is empty."""
    code = "import sys; from fastft.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, "estimate", "--model", "some/model", "--tokens", "1000"]
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("listens", [False, True])
def test_a_hub_that_cannot_be_reached_is_said_without_retries(tmp_path, listens):
    """Refused, and taken up but never answered: one line each, with what helps, and none about trying again."""
    with socket.socket() as hub:
        hub.bind(("127.0.0.1", 0))
        if listens:
            hub.listen()
        done = from_the_hub(tmp_path, f"http://127.0.0.1:{hub.getsockname()[1]}")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: some/model: no such directory, and the Hugging Face Hub cannot be reached (")
    assert "a directory that holds the model's config.json is enough" in done.stderr


def test_an_answer_of_the_hub_is_left_to_transformers(tmp_path, http_hub):
    done = from_the_hub(tmp_path, http_hub)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "some/model: the model's config cannot be read (some/model is not a local folder" in done.stderr
