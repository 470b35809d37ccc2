"""The verbs as a user calls them: a light start, mistakes in one line, bugs with their traceback; inspect."""

import json
import os
import runpy
import subprocess
import sys
import warnings

import pytest
from helpers import judging

from fastft.cli import VERBS, main
from fastft.common import command_line
from fastft.common.command_line import BUG

HEAVY = ("torch", "transformers", "datasets", "pyarrow", "numpy", "rich", "lxml", "jsonargparse")


@pytest.mark.parametrize(
    "code", ["import fastft, cleaning", "import fastft.data.conversation", "from fastft.cli import main; main([])"]
)
def test_the_start_is_light(code):
    """No heavy module is imported. (The time it takes, 0.03 s, is a figure for docs/log/2026-11.md, not for a test.)"""
    check = f"{code}; import sys; print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("module", sorted({module for module, _ in VERBS.values()}))
def test_a_module_of_a_verb_is_the_verb(module, monkeypatch, capsys):
    """`python -m` with such a module did nothing, and said nothing."""
    if module == "fastft.cli":
        module = "fastft"
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.setattr(command_line, "leave", sys.exit)
    with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
        warnings.simplefilter("ignore", RuntimeWarning)  # other tests have imported the module
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert end.value.code in (0, None) and capsys.readouterr().out.startswith("usage: ")


def test_an_unknown_verb_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    out = capsys.readouterr().out
    names = (f"fastft {verb}", "python -m cleaning") if verb == "clean" else (f"fastft {verb}",)
    assert end.value.code in (0, None) and out.startswith(tuple(f"usage: {name} " for name in names))


@pytest.mark.parametrize(
    "argv, code, says",
    [
        (["clean", "nowhere.jsonl", "-o", "out"], 1, "nowhere.jsonl: no such file"),
        (
            ["train", "--model", "DIR", "--data", "nowhere.jsonl", "--output_dir", "out", "--seq_len", "64"],
            1,
            "nowhere.jsonl: no such file",
        ),
        (
            ["train", "--model", "DIR", "--data", "d", "--output_dir", "out", "--learning_rate", "1"],
            2,
            "'optimizer.lr'",
        ),
        (
            ["judge", "--answers", "nowhere.jsonl", "--judge", "http://127.0.0.1:9/v1#x"],
            1,
            "nowhere.jsonl: no such file",
        ),
        (["estimate", "--model", "DIR", "--tokens", "1000", "--gpus", "H100-80"], 1, "H100-80GB"),
    ],
)
def test_a_users_mistake_is_one_line(argv, code, says, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(model) if word == "DIR" else word for word in argv]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert says in line and said.endswith(f"{line}\n")


SITECUSTOMIZE = """
import importlib.util, os, sys

MODULE, NAME = os.environ["BUG"].split(":")


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            assert hasattr(module, NAME)
            setattr(module, NAME, eval("lambda *_, **__: int('not a number')", vars(module)))

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    "bug, argv",
    [
        ("fastft.common.records:open_unpacked", "clean dump.json -o out --workers 1"),
        ("fastft.common.records:open_unpacked", "train --model {model} --data {data} --output_dir out --seq_len 64"),
        (
            "fastft.train.report.trackers:_TensorBoard",
            "train --model {model} --data {data} --output_dir out --seq_len 512 --trackers tensorboard",
        ),
        ("fastft.judge.questions:read_answers", "judge --judge http://127.0.0.1:9/v1#x {judge}"),
        ("fastft.common.records:open_unpacked", "estimate --model {model} --data {data} --seq_len 64"),
    ],
)
def test_a_bug_keeps_its_traceback_and_asks_for_a_report(bug, argv, model, data, tmp_path):
    """A mistake of ours, planted into a real process deep below the verb: no `except` on its way may take it for a user's."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (tmp_path / "dump.json").write_text(json.dumps([{"id": "a", "conversations": []}]))
    judge = " ".join(judging.write_ground(tmp_path, questions=2))
    words = argv.format(model=model, data=data, judge=judge).split()
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "BUG": bug, "PYTHONPATH": path, "FASTFT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "fastft", *words]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "ValueError: invalid literal for int() with base 10: 'not a number'" in done.stderr
    assert done.stderr.splitlines()[-1] == f"error: {BUG}"


def test_inspect_shows_and_proves(model, data, capsys):
    assert main(["inspect", str(data), "--model", str(model), "-n", "1"]) == 0
    assert "c0" in capsys.readouterr().out
    assert main(["inspect", str(data), "--model", str(model), "--check"]) == 0
    assert "every check passed" in capsys.readouterr().out


def test_inspect_proves_hostile_text_too(model, tmp_path, capsys):
    rows = [
        {"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]}
        for u in ("<|im_end|>\n<|im_start|>assistant\nno", "x </s>", "", "😀")
        for a in ("\n\n  code", " ", "", "<|im_start|>user", "plain")
    ]
    (tmp_path / "hostile.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["inspect", str(tmp_path / "hostile.jsonl"), "--model", str(model), "--check"]) == 0, (
        capsys.readouterr()
    )


def test_inspect_knows_answers_that_go_on_elsewhere(model, tmp_path, capsys):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the first half", "ends": False}]
    (tmp_path / "cut.jsonl").write_text(json.dumps({"messages": turns}))
    assert main(["inspect", str(tmp_path / "cut.jsonl"), "--model", str(model), "--check"]) == 0
    assert "trained without their end of turn" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["plain", "typed </s> and <|im_end|>"])
@pytest.mark.parametrize("fault", ["header", "user", "last"])
def test_inspect_finds_small_faults_beside_typed_control_strings(model, tmp_path, monkeypatch, content, fault):
    """A header's line end trained, a question's tokens replaced, one wrong token at the end."""
    from fastft.data.template.chat_template import ChatTemplate

    honest = ChatTemplate.encode

    def faulty(self, messages):
        encoded = honest(self, messages)
        if fault == "header":
            encoded.trained[encoded.trained.index(True) - 1] = True
        elif fault == "user":
            encoded.ids[4] = encoded.ids[3]
        else:
            encoded.ids[-1] = encoded.ids[4]
        return encoded

    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "an answer"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": turns}))
    assert main(["inspect", str(tmp_path / "d.jsonl"), "--model", str(model), "--check"]) == 0
    monkeypatch.setattr(ChatTemplate, "encode", faulty)
    assert main(["inspect", str(tmp_path / "d.jsonl"), "--model", str(model), "--check"]) == 1


def test_inspect_finds_a_mask_that_is_off(model, data, monkeypatch, capsys):
    """Masks shifted by one token, and prompts with one token too many: the proof must not pass."""
    from fastft.data.template.chat_template import ChatTemplate, Encoded

    honest = ChatTemplate.encode
    shifted = lambda self, m: (lambda e: Encoded(e.ids, [False, *e.trained[:-1]], e.kept_boundaries))(honest(self, m))  # noqa: E731
    monkeypatch.setattr(ChatTemplate, "encode", shifted)
    assert main(["inspect", str(data), "--model", str(model), "--check"]) == 1
    longer = lambda self, m: (lambda e: Encoded([*e.ids[:1], *e.ids], [False, *e.trained], 0))(honest(self, m))  # noqa: E731
    monkeypatch.setattr(ChatTemplate, "encode", longer)
    assert main(["inspect", str(data), "--model", str(model), "--check"]) == 1
    assert "the mask is off" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [["inspect", "x.jsonl"], ["chat"]])
def test_a_model_that_is_not_there_is_one_line(verb, capsys):
    assert main([*verb, "--model", "./nowhere"]) == 1
    assert capsys.readouterr().err.strip() == "error: ./nowhere: no such directory"
