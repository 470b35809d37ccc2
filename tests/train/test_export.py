"""Any checkpoint becomes the model that the trainer had there, with a card that says how it was made."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import forks, models
from helpers import training as runs
from helpers.exports import step, trainers_logits

from fastft.cli import main
from fastft.common.files import short_name
from fastft.data.dataset import tokenized
from fastft.data.template.chat_template import load_template
from fastft.train.report.card import model_card
from fastft.train.report.metrics import read_metrics
from fastft.train.report.run_dir import read_run


@pytest.fixture(scope="module")
def run(ground, tmp_path_factory):
    """A finished run with all its checkpoints and a held-out loss at each of them."""
    out = tmp_path_factory.mktemp("runs") / "first"
    more = ["--checkpoint.every", "4", "--checkpoint.keep", "9", "--eval_every", "4", "--price_per_hour", "3600"]
    done = runs.train_here(ground, out, "--eval_data", str(ground / "data.jsonl"), *more)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("number", [4, 8, 9])
def test_the_logits_are_the_trainers(ground, run, tmp_path, number):
    from transformers import AutoModelForCausalLM

    assert main(["export", str(step(run, number)), str(tmp_path / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 90)
    with torch.no_grad():
        exported = model(ids[None]).logits[0]
    torch.testing.assert_close(exported, trainers_logits(run, number, ids), rtol=1e-5, atol=1e-5)
    measured = {row["step"]: row["eval_loss"] for row in read_metrics(run / "metrics.jsonl") if "eval_loss" in row}
    assert runs.plain_loss(model, ground) == pytest.approx(measured[number], rel=1e-5)


def test_a_run_stands_for_its_newest_checkpoint_and_the_trainer_exports_the_same(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "exported: step 9 of first" in capsys.readouterr().err
    for file in sorted(p.name for p in (run / "model").iterdir()):
        ours, trainers = ((directory / file).read_bytes() for directory in (tmp_path / "out", run / "model"))
        assert ours.replace(b'"out"', b'"path/to/this/directory"') == trainers, file
    torn = shutil.copytree(run, tmp_path / "torn")
    (step(torn, 9) / ".metadata").unlink()
    assert main(["export", str(torn), str(tmp_path / "older")]) == 0
    said = capsys.readouterr().err
    assert "step-00000009: passed over: .metadata is missing" in said and "exported: step 8 of torn" in said


def test_the_data_is_not_needed_and_base_models_in_half_precision_stay_so(ground, tmp_path):
    models.make_model(tmp_path / "model", "llama_tied", dtype="bfloat16")
    shutil.copy(ground / "data.jsonl", tmp_path / "data.jsonl")
    done = runs.train_here(tmp_path, tmp_path / "run", "--max_steps", "2")
    assert done.returncode == 0, done.stderr
    (tmp_path / "data.jsonl").unlink()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    ours, trainers = (runs.load_file(tmp_path / name / "model.safetensors") for name in ("out", "run/model"))
    assert ours.keys() == trainers.keys() and {t.dtype for t in ours.values()} == {torch.bfloat16}
    assert all(torch.equal(ours[name], trainers[name]) for name in ours)


# The card ----------------------------------------------------------------------------------------------------------------


def table(card: str, heading: str) -> dict[str, list[str]]:
    lines = re.findall(r"^\| (.*) \|$", card.split(f"## {heading}\n")[1].split("\n## ")[0], re.MULTILINE)
    return {cells[0]: cells[1:] for cells in (line.split(" | ") for line in lines[2:])}


def test_the_card_says_data_recipe_and_figures(ground, run, tmp_path):
    card = (run / "model" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "model" and front["library_name"] == "transformers" and "fastft" in front["tags"]
    data = tokenized(str(ground / "data.jsonl"), load_template(str(ground / "model")))
    counts = [
        f"{int(n):,}" for n in (len(data.select(data.trained_counts.nonzero()[0]).ids), data.trained_counts.sum())
    ]
    first = table(card, "Data")["data.jsonl"]
    assert (first[0], first[2]) == tuple(counts)
    recipe = table(card, "Recipe")
    assert recipe["peak learning rate"] == ["0.01"] and recipe["batch"] == ["4 rows x 160 tokens"]
    assert recipe["schedule"][0].startswith("cosine, warm-up over 3.0 %") and recipe["trained"] == ["all weights"]
    rows = read_metrics(run / "metrics.jsonl")
    measured = table(card, "Measured")
    assert measured["held-out loss"] == [f"{rows[-1]['eval_loss']:.4g} at step 9"]
    assert measured["trained tokens"][0].startswith(f"{sum(r.get('trained_tokens', 0) for r in rows):,} ")
    assert measured["cost"] == [f"${rows[-1]['cost']:,.2f}"]
    assert str(tmp_path.parent) not in card and str(ground) not in card
    assert str(ground) not in (run / "run.json").read_text() and str(ground) not in (run / "report.html").read_text()


def test_the_card_of_a_checkpoint_knows_nothing_of_what_came_later(run):
    card = model_card(read_run(run), 4)
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] <= 4]
    assert "an intermediate checkpoint: step 4 of 9" in card
    assert table(card, "Measured")["held-out loss"] == [f"{rows[-1]['eval_loss']:.4g} at step 4"]
    assert table(card, "Recipe")["steps"] == ["4 of 9"]


def test_names_cannot_break_the_card(run):
    made = read_run(run)
    made.name = "a | b\n# <script>alert(1)</script> \u202e[x](y)"
    made.facts["data"][0][0]["file"] = made.name
    made.facts["model"] = "x\n---\nlicense: mit"
    card = model_card(made, 9)
    assert yaml.safe_load(card.split("\n---\n")[0])["base_model"] == made.facts["model"]
    assert "<script>" not in card and "\u202e" not in card and "\n# &lt;" not in card
    assert len(re.findall(r"^\| a \\\| b # &lt;script", card, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("gpt2", "gpt2"),
        ("/home/someone/models/base", "base"),
        ("./base", "base"),
        ("~/models/base", "base"),
        ("a/b/c.jsonl", "c.jsonl"),
    ],
)
def test_places_are_told_by_their_last_name(place, name):
    assert short_name(place) == name


# The user's mistakes -------------------------------------------------------------------------------------------------------


def fails(arguments: list, out: Path, capsys, *says: str) -> None:
    """Assert that the export ends with one line, and leaves neither the directory nor anything beside it."""
    assert main(["export", *map(str, arguments)]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in errors if line.startswith("error: ")]) == 1
    for text in says:
        assert text in errors[-1]
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()


def test_checkpoints_that_are_not_whole_are_one_line(run, tmp_path, capsys):
    out = tmp_path / "out"
    copy = shutil.copytree(run, tmp_path / "copy")
    shard = next(step(copy, 8).glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    fails([step(copy, 8), out], out, capsys, "step-00000008: is no complete checkpoint", "bytes instead of")
    shard.unlink()
    fails([step(copy, 8), out], out, capsys, "is missing")
    metadata = step(copy, 4) / ".metadata"
    metadata.write_bytes(b"\0" * metadata.stat().st_size)  # sizes right, bytes wrong
    fails([step(copy, 4), out], out, capsys, "step-00000004: the checkpoint cannot be read")
    for name in (4, 8, 9):
        (step(copy, name) / "meta.json").unlink()
    fails([copy, out], out, capsys, "holds no complete checkpoint")


def test_what_is_no_run_is_one_line(ground, run, tmp_path, capsys):
    out = tmp_path / "out"
    fails([tmp_path / "nowhere", out], out, capsys, "nowhere: no such directory")
    fails([ground, out], out, capsys, "is neither a run's directory nor a checkpoint's")
    lost = shutil.copytree(step(run, 4), tmp_path / "somewhere" / "else" / "step-00000004")
    fails([lost, out], out, capsys, "is no run of fastft train (config.yaml and run.json not found there)")
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "run.json").write_text("{")
    fails([copy, out], out, capsys, "run.json: is damaged")


def test_another_model_in_its_place_is_one_line(ground, run, tmp_path, capsys):
    copy, out = shutil.copytree(run, tmp_path / "copy"), tmp_path / "out"
    models.make_model(tmp_path / "other", intermediate_size=96)
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    for model, says in ((tmp_path / "other", "is not the model from which the run started"), ("./gone", "no such dir")):
        (copy / "config.yaml").write_text(yaml.safe_dump(settings | {"model": str(model)}))
        fails([copy, out], out, capsys, says)


def test_nothing_is_written_over(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert main(["export", str(run), str(tmp_path / "out")]) == 1
    assert "out: exists; choose a directory that does not" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("place", ["file/z", "file/y/z", "/proc/z", "/proc/y/z"])
def test_a_place_where_nothing_can_be_made_is_blamed_and_not_the_model(run, tmp_path, capsys, place):
    (tmp_path / "file").write_text("")
    assert main(["export", str(run), str(tmp_path / place)]) == 1
    said = capsys.readouterr().err
    assert re.search(r"^error: .*/(file|y|proc|z\.partial): cannot be made a directory \(", said, re.MULTILINE), said
    assert "config" not in said and "Traceback" not in said


FULL_DISK = """
import resource, signal, sys
from fastft.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(["export", *sys.argv[1:]]))
"""


def test_a_full_disk_leaves_nothing(run, tmp_path):
    done = forks.run(["-c", FULL_DISK, run, tmp_path / "out"])
    runs.fails(done, "out: the model could not be written")
    assert list(tmp_path.iterdir()) == []


def test_without_the_hub_nothing_is_begun(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")
    out = tmp_path / "out"
    fails([run, out, "--push_to_hub", "someone/model"], out, capsys, "--push_to_hub someone/model: ")
    fails([run, out, "--push_to_hub", "not a name"], out, capsys, "--push_to_hub not a name: ")


def test_the_verb_names_what_it_wants(capsys):
    assert main(["export"]) == 2
    assert "checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["export", "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "fastft export" in said and "RUN/checkpoints/step-00000100" in said


def test_options_come_from_a_file_and_unknown_ones_are_named(run, tmp_path, capsys):
    (tmp_path / "export.yaml").write_text(f"checkpoint: {run}\ndirectory: {tmp_path / 'out'}\n")
    assert main(["export", "--config", str(tmp_path / "export.yaml")]) == 0
    assert (tmp_path / "out" / "config.json").exists()
    assert main(["export", str(run), str(tmp_path / "other"), "--push_to_hup", "someone/model"]) == 2
    assert "error: unknown key 'push_to_hup'; the nearest valid one is 'push_to_hub'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["export", str(run), str(tmp_path / "other"), "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == {"checkpoint": str(run), "directory": str(tmp_path / "other"), "push_to_hub": None}


def test_run_json_keeps_the_id_of_the_run(run):
    facts = json.loads((run / "run.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{8}", facts["id"]) and facts["devices"] == "1 x CPU"
