"""The trainer is exact: packing, ranks, accumulation, checkpointing and interruptions leave the numbers as they are."""

import json
import shutil
import sys

import pyarrow as pa
import pytest
import torch
import xxhash
from helpers import gradients, models
from helpers.training import (
    HERE,
    assert_gradients_agree,
    command,
    fails,
    flags,
    here,
    losses,
    plain_gradients,
    run,
    torchrun,
    train,
    train_here,
)
from safetensors.torch import load_file

from fastft.data import step_plan
from fastft.data.conversation import read_conversations
from fastft.data.dataset import tokenized
from fastft.data.step_plan import StepPlan
from fastft.data.template.chat_template import load_template
from fastft.train.checkpoint import local, manifest
from fastft.train.checkpoint.resume import Candidate, complete_files
from fastft.train.report.metrics import read_metrics


@pytest.mark.parametrize("family", models.FAMILIES)
def test_packed_gradients_equal_plain_transformers(family, tmp_path):
    """Packed rows, positions, isolation, masks, chunked loss: all against the library's unpacked fp64 arithmetic."""
    models.make_model(tmp_path / "model", family)
    models.make_data(tmp_path / "data.jsonl")
    packed = gradients.first_gradients(flags(tmp_path, tmp_path / "out"))
    plain = plain_gradients(tmp_path / "model", tmp_path / "data.jsonl", 160)
    assert_gradients_agree({k: v.float() for k, v in plain.items()}, packed)


@pytest.mark.parametrize("family", ["llama_tied", "gemma2"])
def test_the_z_loss_adds_its_gradient_to_every_weight(family, tmp_path):
    models.make_model(tmp_path / "model", family)
    models.make_data(tmp_path / "data.jsonl")
    packed = gradients.first_gradients(flags(tmp_path, tmp_path / "out", "--z_loss", "0.01"))
    plain = plain_gradients(tmp_path / "model", tmp_path / "data.jsonl", 160, z_loss=0.01)
    assert_gradients_agree({k: v.float() for k, v in plain.items()}, packed)
    without = plain_gradients(tmp_path / "model", tmp_path / "data.jsonl", 160)
    assert any((without[k] - plain[k]).abs().max() > 1e-3 * plain[k].abs().max() for k in plain)


def test_the_z_loss_is_reported_beside_the_loss_and_not_held_out(ground, tmp_path):
    more = ["--max_steps", "2", "--optimizer.lr", "1e-9", "--eval_data", str(ground / "data.jsonl")]
    rows = {}
    for weight in ("0", "0.01"):
        out = tmp_path / weight
        assert train_here(ground, out, *more, "--z_loss", weight).returncode == 0
        rows[weight] = read_metrics(out / "metrics.jsonl")
    for plain, with_z in zip(rows["0"], rows["0.01"], strict=True):
        for key in ("loss", "eval_loss"):
            assert plain.get(key, 0) == pytest.approx(with_z.get(key, 0), rel=1e-5)
        assert "z_loss" not in plain and ("loss" not in with_z or 0.1 < with_z["z_loss"] < 1)


def test_gradients_do_not_depend_on_packing_checkpointing_or_micro_batches(ground, tmp_path, monkeypatch):
    whole = gradients.first_gradients(flags(ground, tmp_path, "--micro_batch_size", "4"))
    one_by_one = gradients.first_gradients(flags(ground, tmp_path, "--micro_batch_size", "1"))
    assert_gradients_agree(whole, one_by_one)
    assert_gradients_agree(
        whole, gradients.first_gradients(flags(ground, tmp_path, "--gradient_checkpointing", "false"))
    )

    rows = StepPlan.rows
    alone = lambda self, epoch: [row[i : i + 1] for row in rows(self, epoch)[:4] for i in range(len(row))]  # noqa: E731
    monkeypatch.setattr(StepPlan, "rows", alone)
    unpacked = gradients.first_gradients(flags(ground, tmp_path, "--global_batch_size", "100"))
    assert_gradients_agree(whole, unpacked)


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_number_of_ranks(ground, tmp_path):
    """1 process x 4 micro-batches = 2 x 2 = 4 x 1."""
    results = []
    for processes in (1, 2, 4):
        out = tmp_path / f"{processes}.pt"
        done = run(command(processes, [str(HERE / "gradients.py"), str(out), *flags(ground, tmp_path)]), cwd=HERE)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(out, weights_only=True))
    assert_gradients_agree(results[0], results[1])
    assert_gradients_agree(results[0], results[2])


# Whole runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(ground, tmp_path_factory):
    """An uninterrupted run: 3 epochs, a checkpoint every 4 steps."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = train(ground, out, "--checkpoint.every", "4", "--eval_data", str(ground / "data.jsonl"), "--eval_every", "5")
    assert done.returncode == 0, done.stderr
    return out


def test_held_out_data_is_packed_once_and_not_at_each_evaluation(ground, tmp_path, monkeypatch):
    packed = []
    original = step_plan.pack
    monkeypatch.setattr(step_plan, "pack", lambda *given: packed.append(given) or original(*given))
    more = ("--eval_data", str(ground / "data.jsonl"), "--eval_every", "1", "--epochs", "1", "--trackers", "none")
    done = train_here(ground, tmp_path / "out", *more)
    assert done.returncode == 0, done.stderr
    assert len([row for row in read_metrics(tmp_path / "out/metrics.jsonl") if "eval_loss" in row]) == 3
    assert len(packed) == 2, "the training data and the held-out data"


def test_a_run_leaves_what_it_promises(ground, whole_run):
    rows = read_metrics(whole_run / "metrics.jsonl")
    steps = [r for r in rows if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1))
    keys = {
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "trained_tokens",
        "padding_tokens",
        "tokens_per_s",
        "step_time_s",
        "mfu",
    }
    assert keys <= steps[0].keys()
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert steps[-1]["epoch"] == 3.0
    held_out = [r["eval_loss"] for r in rows if "eval_loss" in r]
    assert len(held_out) >= 2 and held_out[-1] < held_out[0]
    assert list((whole_run / "tensorboard").glob("events*"))
    assert len(list((whole_run / "checkpoints").glob("step-*"))) == 2
    # Every conversation once per epoch: the tokens of an epoch are the tokens of the data.
    data = tokenized(str(ground / "data.jsonl"), load_template(str(ground / "model")))
    usable = data.lengths[data.trained_counts > 0].sum()
    assert sum(r["tokens"] for r in steps) == 3 * usable


def test_the_exported_model_loads_in_transformers_and_stops(whole_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(whole_run / "model")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    assert model.config.use_cache
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]


def test_two_processes_train_like_one(ground, whole_run, tmp_path):
    done = run(torchrun("-m", "fastft.train", *flags(ground, tmp_path / "out")))
    assert done.returncode == 0, done.stderr
    for (_, loss, norm), (_, other_loss, other_norm) in zip(losses(whole_run), losses(tmp_path / "out"), strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-4) and norm == pytest.approx(other_norm, rel=1e-3)


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(ground, whole_run, tmp_path):
    """Two, then one, then four: the same global batches, losses equal to fp32's tolerance."""
    expected, before = losses(whole_run), None
    for processes, steps in ((2, range(1, 4)), (1, range(4, 7)), (4, range(7, 10))):
        out = tmp_path / f"on{processes}"
        if before:
            last = f"checkpoints/step-{steps[0] - 1:08d}"
            shutil.copytree(before / last, out / last)
        done = train(ground, out, "--checkpoint.every", "3", "--checkpoint.keep", "9", processes=processes)
        assert done.returncode == 0, done.stderr
        found = {step: (loss, norm) for step, loss, norm in losses(out)}
        for step, loss, norm in expected[steps[0] - 1 : steps[-1]]:
            assert found[step] == (pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-3)), (processes, step)
        before = out


def test_a_finished_run_exits_at_once(ground, whole_run):
    before = (whole_run / "metrics.jsonl").read_text()
    done = train(ground, whole_run, "--checkpoint.every", "4")
    assert done.returncode == 0 and "finished: step" in done.stderr
    assert (whole_run / "metrics.jsonl").read_text() == before


def manifest_of(step: int) -> str:
    """The manifest of a checkpoint that is one file, shard, with the contents 12345."""
    files = {"shard": {"bytes": 5, "xxh3": xxhash.xxh3_128(b"12345").hexdigest()}}
    return manifest.dumps({"step": step, "world_size": 1, "machines": 1, "identity": {}, "files": files})


def test_the_newest_complete_checkpoint_is_found_without_latest_and_past_torn_ones(tmp_path, monkeypatch):
    for step in (4, 8, 12):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir(parents=True)
        (path / "shard").write_text("12345")
        (path / "meta.json").write_text(manifest_of(step))
    (tmp_path / "step-00000012" / "shard").write_text("123")
    (tmp_path / "step-00000016.tmp").mkdir()
    (tmp_path / "latest").write_text("step-00000099")
    read, reads = manifest.read, []
    monkeypatch.setattr(manifest, "read", lambda path: reads.append(path.name) or read(path))
    found, passed_over = local.complete(tmp_path)
    assert sorted(reads) == [f"step-{step:08d}" for step in (4, 8, 12)], "each manifest is read once"
    assert [(path.name, meta["step"]) for path, meta in found] == [("step-00000008", 8), ("step-00000004", 4)]
    assert passed_over == [f"{tmp_path}/step-00000012: passed over: shard holds 3 bytes instead of 5"]
    assert local.newest(tmp_path) == found[0]


def test_a_run_of_the_last_release_is_resumed_exported_and_reported(ground, whole_run, tmp_path):
    """It called seq_len window, in config.yaml and in the identity of its checkpoints."""
    out = shutil.copytree(whole_run, tmp_path / "out")
    shutil.rmtree(out / "model")
    first, last = sorted((out / "checkpoints").glob("step-*"))
    shutil.rmtree(last)
    for path in (out / "config.yaml", first / "meta.json"):
        assert path.read_text().count("seq_len") == 1
        path.write_text(path.read_text().replace("seq_len", "window"))
    for verb in (["export", str(out), str(tmp_path / "exported")], ["report", str(out)]):
        done = here(verb)
        assert done.returncode == 0 and "window" not in done.stderr, done.stderr
    assert "rows of 160 tokens" in (tmp_path / "exported" / "README.md").read_text()
    done = train_here(ground, out, "--checkpoint.every", "4")
    assert done.returncode == 0 and f"resumed: step 8 from {first}" in done.stderr, done.stderr
    assert losses(out) == losses(whole_run)


def test_other_settings_over_an_earlier_run_are_refused(ground, whole_run):
    fails(train(ground, whole_run, "--seq_len", "144", "--checkpoint.every", "4"), "seq_len was 160 and is 144")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--model", "./nowhere"], "./nowhere: no such directory"),
        (["--template", "nope"], "--template nope: neither a file nor one of"),
        (["--seq_len", "1"], "longer than the sequence length of 1 tokens"),
        (["--seq_len", "1", "--overlong", "drop"], "no conversation is left to train on"),
        (["--seq_len", "4096"], "seq_len 4096 is longer than the 512 positions"),
        (["--global_batch_size", "3", "--micro_batch_size", "2"], "not a multiple of micro_batch_size 2"),
        (["--attention", "varlen"], "varlen needs an NVIDIA GPU"),
    ],
)
def test_mistakes_are_one_clear_line(ground, tmp_path, more, says):
    fails(train_here(ground, tmp_path / "out", *more), says)
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\x7fELF\0\0", "is a binary file"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}\n{"messages": [{"ro', "line 2: not JSON"),
        (b'[{"messages": [{"role": "user", "content": "hi"}]}, 7', "record 2: expected an object, found a number"),
        (b'{"messages": [{"role": "alien", "content": "hi"}]}', "unknown role 'alien'"),
        (b'{"messages": [{"role": "user", "content": 5}]}', "its content is a number, not text"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', "no conversation is left to train on"),
    ],
)
def test_bad_data_is_one_clear_line(ground, tmp_path, content, says):
    (tmp_path / "bad.jsonl").write_bytes(content)
    fails(train_here(ground, tmp_path / "out", "--data", str(tmp_path / "bad.jsonl")), says)


def test_a_model_without_tokenizer_or_template_is_one_clear_line(ground, tmp_path):
    bare = shutil.copytree(ground / "model", tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    fails(train_here(ground, tmp_path / "out", "--model", str(bare)), "holds no tokenizer")
    untold = shutil.copytree(ground / "model", tmp_path / "untold")
    (untold / "chat_template.jinja").unlink()
    fails(
        train_here(ground, tmp_path / "out", "--model", str(untold)), "no chat template; choose one: --template chatml|"
    )


# Once a first checkpoint is published, no file can grow beyond 20 kB, as on a disk that fills up during a run.
FULL_AFTER_THE_FIRST_CHECKPOINT = """
import resource, signal, sys
from fastft.cli import main
from fastft.train.checkpoint import local
class Filling(local.Writer):
    def save(self, *arguments):
        super().save(*arguments)
        self.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
local.Writer = Filling
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_that_looks_whole(ground, whole_run, tmp_path):
    out = tmp_path / "out"
    arguments = flags(ground, out, "--checkpoint.every", "4")
    fails(
        run([sys.executable, "-c", FULL_AFTER_THE_FIRST_CHECKPOINT, *arguments]),
        "could not be written",
        "File too large",
    )
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["latest", "step-00000004"]
    assert not (out / "model").exists()
    assert run([sys.executable, "-m", "fastft.train", *arguments]).returncode == 0
    assert losses(out) == losses(whole_run)


def test_torchs_words_for_a_full_disk_are_put_plainly(ground, tmp_path, monkeypatch):
    """torch's writer said this on a disk of 300 kB; it loses the operating system's error."""

    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(local.dcp, "save", full)
    done = train_here(ground, tmp_path / "out", "--max_steps", "1")
    fails(done, "could not be written (No space left on device: ", " KiB needed, ", " free", "make room and start")
    weights = sum(tensor.nbytes for tensor in load_file(ground / "model" / "model.safetensors").values())
    needed = float(done.stderr.split("device: ")[1].split(" KiB")[0])
    assert needed == pytest.approx(3 * weights / 2**10, rel=0.05)  # fp32 weights, two moments, and the run's own files


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "s_aux"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "bloom"),
        ("mamba", {"intermediate_size": None}, "mamba"),
    ],
)
def test_architectures_that_would_mix_conversations_are_refused(ground, tmp_path, family, options, says):
    """Attention sinks, positions that do not restart, a state from token to token: each would mix them unnoticed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = shutil.copytree(ground / "model", tmp_path / "model")
    sizes = {k: v for k, v in {**models.SIZES, **options}.items() if v is not None}
    words = len(load_template(str(ground / "model")).tokenizer)
    # With weights of 0.02, as by default, what leaks between two conversations can be 1e-6 of the loss.
    config = AutoConfig.for_model(family, vocab_size=words, initializer_range=0.3, **sizes)
    (model / "model.safetensors").unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    fails(train_here(ground, tmp_path / "out", "--model", str(model)), says)


def test_the_model_that_a_run_starts_from_is_never_written_over(ground, tmp_path):
    shutil.copytree(ground / "model", tmp_path / "model")
    fails(
        train_here(ground, tmp_path, "--model", str(tmp_path / "model")),
        "model: is not this run's and would be overwritten; choose another",
    )


def test_the_cleaners_report_is_never_written_over(ground, tmp_path):
    for name in ("report.json", "report.html"):
        (tmp_path / name).write_text("the cleaner's")
    fails(train_here(ground, tmp_path), "report.json: is not this run's and would be overwritten; choose another")
    assert (tmp_path / "report.html").read_text() == "the cleaner's"


def test_another_model_in_the_same_place_is_not_this_run(ground, whole_run, tmp_path):
    other = models.make_model(tmp_path / "other", intermediate_size=96)
    fails(train_here(ground, whole_run, "--model", str(other), "--checkpoint.every", "4"), "model was")


def test_pruning_keeps_the_last_good_checkpoint(tmp_path):
    for step, content in ((10, "12345"), (16, "123")):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        (path / "shard").write_text(content)
        (path / "meta.json").write_text(manifest_of(step))
    local.prune(tmp_path, 16, keep=1)
    assert local.newest(tmp_path)[1]["step"] == 10


def test_pruning_takes_nothing_for_whole_that_a_start_has_passed_over(tmp_path):
    """The files of 20 and 30 have the right size and the wrong contents, so the run went on from 10, and has saved 15."""
    for step in (10, 15, 20, 30):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        (path / "shard").write_text("12345" if step < 20 else "12340")
        (path / "meta.json").write_text(manifest_of(step))
    local.prune(tmp_path, 15, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


def test_files_without_their_manifest_are_no_checkpoint(tmp_path):
    (tmp_path / "shard").write_text("12345")
    meta = {"files": {"shard": manifest.entry(tmp_path / "shard")}}
    assert complete_files(Candidate(meta, None), tmp_path, None) == "meta.json is missing"


def test_a_damaged_checkpoint_is_passed_over(ground, whole_run, tmp_path):
    """Its files have the right sizes and the wrong contents, so the next older checkpoint is used."""
    out = shutil.copytree(whole_run, tmp_path / "out")
    shutil.rmtree(out / "model")
    last = sorted((out / "checkpoints").glob("step-*"))[-1]
    metadata = last / ".metadata"
    metadata.write_bytes(b"\0" * metadata.stat().st_size)
    done = train_here(ground, out, "--checkpoint.every", "4")
    assert done.returncode == 0, done.stderr
    assert f"{last.name}: passed over: .metadata does not hold what was written" in done.stderr
    assert losses(out) == losses(whole_run)


def test_tokens_are_made_again_when_the_end_token_changes_or_the_cache_is_damaged(ground, tmp_path, monkeypatch):
    from helpers import tiny

    from fastft.data.dataset import cache_directory
    from fastft.data.template.chat_template import template_for

    monkeypatch.setenv("FASTFT_CACHE", str(tmp_path / "cache"))
    data, tokenizer = str(ground / "data.jsonl"), tiny.byte_level()
    first = tokenized(data, template_for(tokenizer, "vicuna"))
    tokenizer.eos_token = "<|im_end|>"
    other = tokenized(data, template_for(tokenizer, "vicuna"))
    assert first.digests != other.digests and first.ids[0][-1] != other.ids[0][-1]
    expected = other.ids[0].tolist()  # a copy: the arrays are views of the file
    for path in cache_directory().glob("*.arrow"):
        path.rename(tmp_path / path.name)
        path.write_bytes((tmp_path / path.name).read_bytes()[:100])
    assert tokenized(data, template_for(tokenizer, "vicuna")).ids[0].tolist() == expected
    for path in cache_directory().glob("*.arrow"):  # as an earlier version wrote it
        table = pa.ipc.open_file((tmp_path / path.name).read_bytes()).read_all()
        table = table.rename_columns(
            [name.replace("kept_boundaries", "merged_boundaries") for name in table.column_names]
        )
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    assert tokenized(data, template_for(tokenizer, "vicuna")).ids[0].tolist() == expected


def test_conversations_with_ten_thousand_turns_are_counted_not_cut(ground, tmp_path):
    turns = [{"role": role, "content": "x"} for _ in range(5000) for role in ("user", "assistant")]
    (tmp_path / "long.jsonl").write_text(json.dumps({"id": "long", "messages": turns}))
    assert len(next(read_conversations(tmp_path / "long.jsonl")).messages) == 10_000
    done = train_here(ground, tmp_path / "out", "--data", str(tmp_path / "long.jsonl"))
    fails(done, "1 of 1 conversations are longer than the sequence length of 160 tokens", "--max_tokens 160")
