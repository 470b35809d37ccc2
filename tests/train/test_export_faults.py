"""No training is lost at its end: what cannot be exported is not trained, and what fails at the export is done later."""

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import disks, exports, models
from helpers import training as runs
from safetensors.torch import load_file

from fastft.cli import main
from fastft.model import huggingface
from fastft.train import loop
from fastft.train.checkpoint import local

VICUNA = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6}
FEW = ("--max_steps", "2")


@pytest.fixture(scope="module")
def vicuna(ground, tmp_path_factory):
    """A copy of `ground` whose generation_config.json is Vicuna's: it samples without saying so."""
    path = shutil.copytree(ground, tmp_path_factory.mktemp("vicuna") / "ground")
    (path / "model" / "generation_config.json").write_text(json.dumps(VICUNA))
    return path


@pytest.fixture(scope="module")
def finished(vicuna, tmp_path_factory):
    """A finished run in which nothing went wrong."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = runs.train_here(vicuna, out, *FEW)
    assert done.returncode == 0, done.stderr
    (out / "said").write_text(done.stderr)
    return out


def steps_of(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("step-*"))


def nothing_is_there(out: Path) -> None:
    assert not any((out / name).exists() for name in ("model", "model.partial", "adapter", "adapter.partial"))


def same_model(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# Vicuna v1.5's and Llama 2's generation configs ----------------------------------------------------------------------------


def test_sampling_without_do_sample_is_mended_and_said_once(finished):
    from transformers import AutoModelForCausalLM

    written = json.loads((finished / "model" / "generation_config.json").read_text())
    assert (written["do_sample"], written["temperature"], written["top_p"]) == (True, 0.9, 0.6)
    notes = [line for line in (finished / "said").read_text().splitlines() if "do_sample" in line]
    assert len(notes) == 1 and "temperature 0.9 and top_p 0.6" in notes[0]
    answer = AutoModelForCausalLM.from_pretrained(finished / "model").generate(torch.tensor([[5, 6]]), max_new_tokens=3)
    assert answer.shape[1] > 2


def test_a_checkpoint_of_a_run_that_ended_without_a_model_is_exported(vicuna, finished, tmp_path, capsys):
    """The version that began its run did not look at the generation config."""
    older = shutil.copytree(finished, tmp_path / "older")
    shutil.rmtree(older / "model")
    assert main(["export", str(older / "checkpoints" / "step-00000002"), str(tmp_path / "out")]) == 0
    assert "temperature 0.9 and top_p 0.6 without do_sample" in capsys.readouterr().err
    assert same_model(tmp_path / "out", finished / "model")
    done = runs.train_here(vicuna, older, *FEW)
    assert done.returncode == 0 and "resumed: step 2" in done.stderr
    assert runs.losses(older) == runs.losses(finished) and same_model(older / "model", finished / "model")


# Refused before the first step ---------------------------------------------------------------------------------------------


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def unsavable_config(model: Path) -> None:
    edit(model / "config.json", to_json_file={})  # transformers makes an attribute of it, where it has a method


def unsavable_tokenizer(model: Path) -> None:
    edit(model / "tokenizer_config.json", note="half a character: \ud83d")


def tokenizer_with_nan(model: Path) -> None:
    edit(model / "tokenizer_config.json", note=float("nan"))


def unsavable_template(model: Path) -> None:
    template = model / "chat_template.jinja"
    edit(model / "tokenizer_config.json", chat_template="{# \udc00 #}" + template.read_text())
    template.unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (unsavable_config, "its config, or its generation config, cannot be saved"),
        (unsavable_tokenizer, "its tokenizer with its chat template cannot be saved ('utf-8' codec can't encode"),
        (tokenizer_with_nan, "its tokenizer cannot be saved (tokenizer_config.json would hold NaN, which JSON cannot"),
        (unsavable_template, "its tokenizer with its chat template cannot be saved ('utf-8' codec can't encode"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_tokenised(vicuna, tmp_path, damage, says):
    model, out = shutil.copytree(vicuna / "model", tmp_path / "model"), tmp_path / "out"
    damage(model)
    done = runs.train_here(vicuna, out, "--model", str(model))
    runs.fails(done, f"{model}: {says}", "mend it first")
    assert "plan:" not in done.stderr and [path.name for path in out.iterdir()] == [".lock"]


@pytest.mark.parametrize("owner, name", [(huggingface.ModelFiles, "chat_template"), (huggingface, "_usual_mode")])
@pytest.mark.parametrize("error", [KeyError("planted"), FileNotFoundError(2, "planted", "/x"), ValueError("planted")])
def test_a_bug_is_not_called_a_model_that_cannot_be_saved(ground, tmp_path, monkeypatch, owner, name, error):
    def bug(*given):
        raise error

    monkeypatch.setattr(owner, name, property(bug) if isinstance(owner, type) else bug)
    done = runs.train_here(ground, tmp_path / "out", *FEW)
    assert done.returncode == 1 and "Traceback" in done.stderr and type(error).__name__ in done.stderr
    assert "please report it" in done.stderr and "cannot be saved" not in done.stderr
    assert "could not be written" not in done.stderr


def test_a_dry_run_refuses_it_too_and_writes_nothing(vicuna, tmp_path):
    model = shutil.copytree(vicuna / "model", tmp_path / "model")
    unsavable_tokenizer(model)
    runs.fails(
        runs.train_here(vicuna, tmp_path / "out", "--model", str(model), "--dry_run", "true"), "its tokenizer with"
    )
    assert not (tmp_path / "out").exists()


def test_adapters_settings_are_proven_too(vicuna, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    to_dict = peft.LoraConfig.to_dict
    # As a later version might.
    monkeypatch.setattr(peft.LoraConfig, "to_dict", lambda self: to_dict(self) | {"new": {1j}})
    done = runs.train_here(vicuna, tmp_path / "out", "--lora.r", "4")
    runs.fails(done, "lora: the adapter's config cannot be saved (Object of type complex is not JSON serializable)")
    assert "plan:" not in done.stderr


def test_a_tokenizer_that_makes_other_tokens_when_it_is_read_again_is_refused(vicuna, tmp_path, monkeypatch):
    """The saved form of some tokenizer classes is not what they were read from."""
    from transformers import PreTrainedTokenizerFast
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    save = TokenizersBackend._save_pretrained

    def lossy(self, save_directory, *given, **more):
        files = save(self, save_directory, *given, **more)
        spec = json.loads(Path(save_directory, "tokenizer.json").read_text())
        spec["model"]["merges"] = spec["model"]["merges"][:10]
        Path(save_directory, "tokenizer.json").write_text(json.dumps(spec))
        return files

    assert issubclass(PreTrainedTokenizerFast, TokenizersBackend)
    monkeypatch.setattr(TokenizersBackend, "_save_pretrained", lossy)
    runs.fails(
        runs.train_here(vicuna, tmp_path / "out"), "its tokenizer cannot be saved (read again, it makes other tokens)"
    )


def test_templates_survive_line_ends_signatures_and_every_language(vicuna, tmp_path):
    """A file as Windows writes it: what is trained, and what the exported model is asked with, is the same template."""
    from transformers import AutoTokenizer

    source = (vicuna / "model" / "chat_template.jinja").read_text()
    odd = "{# é 日本 🙂 \u2028 \x85 #}" + source
    (tmp_path / "odd.jinja").write_bytes(b"\xef\xbb\xbf" + odd.replace("\n", "\r\n").encode())
    done = runs.train_here(vicuna, tmp_path / "out", *FEW, "--template", str(tmp_path / "odd.jinja"))
    assert done.returncode == 0, done.stderr
    plain, read = (AutoTokenizer.from_pretrained(path) for path in (vicuna / "model", tmp_path / "out" / "model"))
    assert read.chat_template == odd
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert read.apply_chat_template(messages)["input_ids"] == plain.apply_chat_template(messages)["input_ids"]


def test_a_template_of_a_tokenizer_config_keeps_its_meaning_with_other_line_ends(vicuna, tmp_path):
    from transformers import AutoTokenizer

    model = shutil.copytree(vicuna / "model", tmp_path / "model")
    source = (model / "chat_template.jinja").read_text().replace("\n", "\r\n") + "{# \r #}"
    (model / "chat_template.jinja").unlink()
    edit(model / "tokenizer_config.json", chat_template=source)
    done = runs.train_here(vicuna, tmp_path / "out", *FEW, "--model", str(model))
    assert done.returncode == 0, done.stderr
    plain, read = (AutoTokenizer.from_pretrained(path) for path in (model, tmp_path / "out" / "model"))
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert read.apply_chat_template(messages)["input_ids"] == plain.apply_chat_template(messages)["input_ids"]


def test_a_template_that_is_not_utf_8_is_one_line(vicuna, tmp_path):
    (tmp_path / "latin.jinja").write_bytes("{# Übung #}".encode("latin-1"))
    done = runs.train_here(vicuna, tmp_path / "out", "--template", str(tmp_path / "latin.jinja"))
    runs.fails(done, "latin.jinja: is not UTF-8 (byte 3); save it as UTF-8")


def test_a_config_with_numbers_that_are_none_survives(vicuna, tmp_path):
    model = shutil.copytree(vicuna / "model", tmp_path / "model")
    edit(model / "config.json", limits=[0.0, float("inf")])
    done = runs.train_here(vicuna, tmp_path / "out", *FEW, "--model", str(model))
    assert done.returncode == 0, done.stderr
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(tmp_path / "out" / "model").limits == [0.0, float("inf")]
    assert "Infinity," not in (tmp_path / "out" / "model" / "config.json").read_text()


# The end of a run ----------------------------------------------------------------------------------------------------------

# Once all steps are done, no file can grow beyond a limit, as on a disk that is full at the very end.
FULL_AT_THE_END = """
import resource, signal, sys
from fastft.common import logs
from fastft.common.command_line import leave, run
from fastft.common.distributed import first_to_fail
from fastft.model import huggingface
from fastft.train import loop
export = huggingface.export
def full(*given):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    export(*given)
limit = sys.argv.pop(1)
huggingface.export = full
logs.show()
leave(run(loop.main, first_to_fail))
"""


def command_in(done: subprocess.CompletedProcess) -> list[str]:
    line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    return shlex.split(line.partition("and so does: ")[2])


def size(path: Path) -> int:
    return path.stat().st_size


@pytest.mark.parametrize("fails_at", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_disk_that_is_full_at_the_very_end_costs_no_training(vicuna, finished, tmp_path, fails_at):
    out = tmp_path / "a place with spaces" / "run"
    sizes = {path.name: size(path) for path in (finished / "model").iterdir()}
    limit = sizes[fails_at] - 1
    done = runs.run([sys.executable, "-c", FULL_AT_THE_END, str(limit), *runs.flags(vicuna, out, *FEW)])
    runs.fails(done, "model: the model could not be written (", "File too large", "Step 2, the last, is saved")
    nothing_is_there(out)
    assert steps_of(out) == ["step-00000002"] and local.fault_of(out / "checkpoints" / "step-00000002") is None

    assert command_in(done)[:2] == ["fastft", "export"]
    copy = shutil.copytree(out, tmp_path / "copy")
    assert main(command_in(done)[1:]) == 0
    assert same_model(out / "model", finished / "model")
    assert "finished: step 2 of 2" in runs.train_here(vicuna, out, *FEW).stderr

    again = runs.train_here(vicuna, copy, *FEW)
    assert again.returncode == 0 and "resumed: step 2" in again.stderr
    assert runs.losses(copy) == runs.losses(finished) and same_model(copy / "model", finished / "model")


def test_adapters_that_do_not_fit_on_the_disk_cost_no_training(vicuna, tmp_path):
    pytest.importorskip("peft")
    out, flags = tmp_path / "out", (*FEW, "--lora.r", "8")
    done = runs.run([sys.executable, "-c", FULL_AT_THE_END, "5000", *runs.flags(vicuna, out, *flags)])
    runs.fails(done, "the model could not be written (", "File too large", "and so does: fastft export ")
    nothing_is_there(out)
    assert main(command_in(done)[1:]) == 0 and not (out / "adapter").exists()  # the model alone
    again = runs.train_here(vicuna, out, *flags)
    assert again.returncode == 0 and "resumed: step 2" in again.stderr
    assert (out / "adapter" / "adapter_model.safetensors").exists() and (out / "model" / "README.md").exists()
    assert "finished: step 2 of 2" in runs.train_here(vicuna, out, *flags).stderr


@pytest.mark.slow
def test_two_processes_end_with_one_line_and_go_on_together(vicuna, tmp_path):
    (tmp_path / "script.py").write_text(FULL_AT_THE_END)
    out, flags = tmp_path / "out", runs.flags(vicuna, tmp_path / "out", *FEW)
    done = runs.run(runs.command(2, [str(tmp_path / "script.py"), "20000", *flags]))
    runs.fails(done, "the model could not be written (", "File too large", "and so does: fastft export ")
    nothing_is_there(out)
    again = runs.train(vicuna, out, *FEW, processes=2)
    assert again.returncode == 0 and "resumed: step 2" in again.stderr
    assert main(["export", str(out), str(tmp_path / "exported")]) == 0
    assert same_model(out / "model", tmp_path / "exported")


def test_two_processes_refuse_with_one_line(vicuna, tmp_path):
    model = shutil.copytree(vicuna / "model", tmp_path / "model")
    unsavable_tokenizer(model)
    done = runs.train(vicuna, tmp_path / "out", "--model", str(model), processes=2)
    runs.fails(done, f"{model}: its tokenizer with its chat template cannot be saved")


# No file reaches the storage before the export has failed, and the limit is lifted.
STORAGE_THAT_WAITS = """
import resource, threading
from fastft.common.object_store import Store
from fastft.model import huggingface
over, put, write = threading.Event(), Store.put, huggingface._replace
def late(self, *given):
    over.wait()
    put(self, *given)
def then(*given):
    try:
        write(*given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        over.set()
Store.put, huggingface._replace = late, then
"""


def test_storage_has_the_last_checkpoint_of_a_run_whose_export_fails(vicuna, finished, tmp_path):
    """The disk of a spot machine is lost when the run ends."""
    out, remote = tmp_path / "out", ("--checkpoint.remote", f"file://{tmp_path}/bucket/run")
    flags = runs.flags(vicuna, out, *FEW, *remote)
    done = runs.run([sys.executable, "-c", STORAGE_THAT_WAITS + FULL_AT_THE_END, "20000", *flags])
    runs.fails(done, "the model could not be written (", "Step 2, the last, is saved")
    shutil.rmtree(out)
    again = runs.train_here(vicuna, out, *FEW, *remote)
    assert again.returncode == 0 and "resumed: step 2" in again.stderr, again.stderr
    assert same_model(out / "model", finished / "model")
    assert (tmp_path / "bucket" / "run" / "model" / "model.safetensors").exists()


@pytest.fixture
def small_disk(finished, tmp_path):
    """A file system that has room for a run and half of its model."""
    files = [path for path in finished.rglob("*") if path.is_file()]
    model = sum(size(path) for path in (finished / "model").iterdir())
    whole = sum(-(-size(path) // 4096) * 4096 for path in files) - model
    with disks.small_disk(tmp_path / "disk", whole + model // 2) as disk:
        yield disk


def test_a_real_disk_that_is_full_at_the_very_end(vicuna, finished, small_disk):
    done = runs.train_here(vicuna, small_disk / "run", *FEW)
    runs.fails(
        done, "model: the model could not be written (", "No space left on device", "and so does: fastft export "
    )
    nothing_is_there(small_disk / "run")
    disks.grow(small_disk)
    again = runs.train_here(vicuna, small_disk / "run", *FEW)
    assert again.returncode == 0 and "resumed: step 2" in again.stderr
    assert same_model(small_disk / "run" / "model", finished / "model")


KILLED_WHILE_IT_WRITES = """
import os, signal, sys
from fastft.cli import main
from fastft.model import huggingface
def gone(*given):
    os.kill(os.getpid(), signal.SIGKILL)
huggingface._usual_mode = gone
main(["train", *sys.argv[1:]])
"""


def test_a_kill_while_the_model_is_written_leaves_none(vicuna, finished, tmp_path):
    out = tmp_path / "out"
    done = runs.run([sys.executable, "-c", KILLED_WHILE_IT_WRITES, *runs.flags(vicuna, out, *FEW)])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "model").exists() and (out / "model.partial" / "model.safetensors").exists()
    again = runs.train_here(vicuna, out, *FEW)
    assert again.returncode == 0 and "resumed: step 2" in again.stderr
    assert same_model(out / "model", finished / "model") and not (out / "model.partial").exists()


def test_a_bug_in_the_export_keeps_its_traceback_and_says_that_nothing_is_lost(vicuna, tmp_path, monkeypatch):
    def bug(*given):
        raise RuntimeError("a bug")

    monkeypatch.setattr(huggingface, "_gathered", bug)
    done = runs.train_here(vicuna, tmp_path / "out", *FEW)
    assert done.returncode == 1 and done.stderr.count("RuntimeError: a bug") == 1
    assert "Step 2, the last, is saved" in done.stderr and "this is a bug in fastft" in done.stderr.splitlines()[-1]
    assert steps_of(tmp_path / "out") == ["step-00000002"]


def test_a_damaged_run_json_at_the_end_costs_no_training(vicuna, tmp_path, monkeypatch):
    read = loop.read_run

    def damaged(directory):
        (directory / "run.json").write_text("{")
        return read(directory)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "read_run", damaged)
        done = runs.train_here(vicuna, tmp_path / "out", *FEW)
        runs.fails(done, "run.json: is damaged", "Step 2, the last, is saved")
    again = runs.train_here(vicuna, tmp_path / "out", *FEW)
    assert again.returncode == 0 and "resumed: step 2" in again.stderr


# What is written -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_of_the_umask(vicuna, finished, tmp_path, umask):
    before = os.umask(umask)
    try:
        assert main(["export", str(finished), str(tmp_path / "out")]) == 0
        out = tmp_path / "run"
        assert runs.train_here(vicuna, out, *FEW, "--lora.r", "4").returncode == 0
    finally:
        os.umask(before)
    for directory in (tmp_path / "out", out / "model", out / "adapter"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o777 & ~umask
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
        assert set(modes.values()) == {0o666 & ~umask}, modes


@pytest.mark.parametrize("family", ["llama_tied", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("more", [(), ("--resize_embeddings", "true")], ids=["", "resized"])
def test_tied_models_load_with_the_trainers_logits(vicuna, tmp_path, family, more):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models.make_model(tmp_path / "model", family)
    if more:  # a token that the model has no embedding for
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        tokenizer.add_tokens([f"<|new {i}|>" for i in range(8)])
        tokenizer.save_pretrained(tmp_path / "model")
    shutil.copy(vicuna / "data.jsonl", tmp_path / "data.jsonl")
    done = runs.train_here(tmp_path, tmp_path / "run", *FEW, *more)
    assert done.returncode == 0, done.stderr
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    ids = torch.arange(3, 90)
    trainers = exports.trainers_logits(tmp_path / "run", 2, ids)
    for path in (tmp_path / "run" / "model", tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        cap = getattr(model.config, "final_logit_softcapping", None)
        expected = torch.tanh(trainers / cap) * cap if cap else trainers  # the trainer's head is heard before its cap
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
