"""A task that cannot work is refused in one line, and the three splits never share a text."""

import json

import pytest
import yaml
from helpers.grimoires import rows, write_rows, write_task

from fastft.compose.grimoire import build, check, task
from fastft.errors import UserError
from fastft.inference.endpoint import EndpointConfig


def line_of(path) -> str:
    """The one line that reading the task ends in."""
    with pytest.raises(UserError) as refused:
        task.divided(task.read_task(path))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"labels": None}, "has no labels"),
        ({"labels": []}, "has no labels"),
        ({"labels": ["even"]}, "has one label, 'even'"),
        ({"labels": [True, False]}, "put quotes around"),
        ({"labels": "even, odd"}, "must be a list"),
        ({"labels": ["even", "EVEN."]}, "are the same when answers are read"),
        ({"labels": ["even", "…"]}, "no answer can be compared"),
        ({"description": " "}, "has no description"),
        ({"train": None}, "has no train"),
        ({"train": "nowhere.jsonl"}, "no such file"),
        ({"test": "train.jsonl"}, "name the same file"),
        ({"lables": ["a", "b"]}, "unknown key 'lables'"),
        ({"labels": ["big", "small"]}, "its label 'odd' is none of big, small"),
    ],
)
def test_a_task_that_cannot_work_is_refused_in_one_line(tmp_path, changed, said):
    assert said in line_of(write_task(tmp_path, **changed))


def test_a_file_that_is_no_yaml_or_not_there_is_refused(tmp_path):
    assert "no such file" in line_of(tmp_path / "none.yaml")
    (tmp_path / "task.yaml").write_text("labels: [a")
    assert "is not YAML" in line_of(tmp_path / "task.yaml")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "", "label": "even"}, "its text is missing"),
        ({"text": "2"}, "its label is missing"),
        ({"text": "2", "label": "even", "id": "q1"}, "stands there twice"),
        ({"text": "2", "label": "even", "zero_shot_correct": 1}, "1 or 0 for each model"),
    ],
)
def test_a_row_that_is_no_question_is_named_by_its_line(tmp_path, row, said):
    path = write_task(tmp_path)
    write_rows(tmp_path / "train.jsonl", [*rows(3), row])
    assert "train.jsonl: line 4" in line_of(path)
    assert said in line_of(path)


@pytest.mark.parametrize(("labels", "values"), [([1, 2], [1, 2]), (["true", "false"], [True, False])])
def test_numbers_and_truth_values_of_json_are_labels(tmp_path, labels, values):
    path = write_task(tmp_path, labels=labels, validation=None, test=None)
    write_rows(tmp_path / "train.jsonl", [{"text": f"number {n}", "label": values[n % 2]} for n in range(40)])
    split = task.divided(task.read_task(path))
    assert {each.label for each in split.train} == set(map(str, labels))


def test_a_label_without_a_training_question_is_said(tmp_path):
    split = task.divided(task.read_task(write_task(tmp_path, labels=["even", "odd", "neither nor"])))
    assert any("has the label 'neither nor'" in remark for remark in split.remarks)


def test_a_label_that_is_part_of_another_is_said_in_a_line(tmp_path, caplog, capsys):
    path = write_task(tmp_path, labels=["true", "untrue"])
    made = [{"text": f"sentence {n} of its own", "label": ("true", "untrue")[n % 2]} for n in range(30)]
    for name in ("train", "validation"):
        write_rows(tmp_path / f"{name}.jsonl", [{**row, "text": f"{name} {row['text']}"} for row in made])
    check.main([str(path)])
    assert "label 'true' is part of 'untrue'" in capsys.readouterr().out
    config = build.BuildConfig(task=path, weak="http://127.0.0.1:1/v1#weak", output=tmp_path / "o", dry_run=True)
    build.build(config, EndpointConfig())
    assert "'true' is part of 'untrue'" in caplog.text


def test_a_split_that_is_not_named_is_set_aside_by_the_text_alone(tmp_path):
    path = write_task(tmp_path, validation=None, test=None)
    made = rows(300)
    write_rows(tmp_path / "train.jsonl", made)
    one = task.divided(task.read_task(path))
    write_rows(tmp_path / "train.jsonl", [*reversed(made), {**made[0], "id": "again", "text": made[0]["text"].upper()}])
    other = task.divided(task.read_task(path))
    assert {each.text.lower() for each in one.validation} == {each.text.lower() for each in other.validation}
    assert 100 < len(one.train) < 220 and 40 < len(one.validation) < 120
    assert any("1 of 301 questions" in remark for remark in other.remarks)


def test_the_same_text_is_never_in_two_splits(tmp_path):
    path = write_task(tmp_path)
    for name, start in (("validation", 1000), ("test", 2000)):
        twin = {**rows(1)[0], "id": "twin", "text": rows(1)[0]["text"].replace(":", " -")}
        write_rows(tmp_path / f"{name}.jsonl", [*rows(10, start), twin])
    read = task.read_task(path)
    split = task.split_questions(read, tmp_path / "splits")
    assert len(split.validation) == 10 and any("an earlier split or row" in remark for remark in split.remarks)
    assert task.split_questions(read, tmp_path / "splits") == split  # from the files
    test, remarks = task.read_test(read, tmp_path / "splits", [*split.train, *split.validation])
    assert len(test) == 10 and "1 of 11 questions of test" in remarks[0]


def test_a_limit_takes_the_same_questions_whatever_their_order(tmp_path):
    split = task.divided(task.read_task(write_task(tmp_path)))
    some = {each.id for each in task.first_by_hash(split.train, 7)}
    assert len(some) == 7
    assert {each.id for each in task.first_by_hash(list(reversed(split.train)), 7)} == some


def test_a_task_file_of_the_documentation_is_read(tmp_path):
    path = write_task(tmp_path)
    assert set(yaml.safe_load(path.read_text())) <= set(task.KEYS)
    assert json.dumps(task.read_task(path).labels) == '["even", "odd"]'
