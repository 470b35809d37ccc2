"""The command lines of `fastft answer`, `judge` and `bench`: one set of keys as flags and as YAML, mistakes in one line."""

import json

import pytest
import yaml
from helpers import openai_server
from helpers.judging import judged, longer_wins, write_ground

from fastft import cli


def test_a_file_of_options_judges_like_flags(tmp_path, capsys):
    """Lists in YAML are what repeated flags are; a flag after --config wins."""
    _, a, b, _, questions, _, output = write_ground(tmp_path, 3)
    with openai_server.endpoint(longer_wins) as server:
        config = {
            "answers": [a, b],
            "questions": questions,
            "judge": [f"{server.url}#one", f"{server.url}#two"],
            "usd_per_million": ["1,1", "2,2"],
            "max_usd": 5,
            "one_order": True,
            "output": output,
        }
        (tmp_path / "judge.yaml").write_text(yaml.safe_dump(config))
        assert cli.main(["judge", "--config", str(tmp_path / "judge.yaml"), "--concurrency", "2"]) == 0
    assert [judgment.judge for judgment in judged(tmp_path)] == ["one", "two"] * 3


def test_the_printed_config_is_the_file_that_was_read(tmp_path, capsys):
    options = ["judge", "--answers", "a.jsonl", "b.jsonl", "--judge", "http://x/v1#one", "--judge", "http://x/v1#two"]
    keys = ["--judge_key_env", "ONE", "--judge_key_env", "", "--dry_run", "--usd_per_million", "2,8"]
    with pytest.raises(SystemExit):
        cli.main([*options, *keys, "--print_config"])
    printed = capsys.readouterr().out
    (tmp_path / "judge.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        cli.main(["judge", "--config", str(tmp_path / "judge.yaml"), "--print_config"])
    assert capsys.readouterr().out == printed
    config = yaml.safe_load(printed)
    assert config["answers"] == ["a.jsonl", "b.jsonl"]
    assert config["judge"] == ["http://x/v1#one", "http://x/v1#two"]
    assert config["judge_key_env"] == ["ONE", ""]
    assert (config["usd_per_million"], config["dry_run"], config["output"]) == (["2,8"], True, None)


def test_answer_takes_its_options_from_a_file_and_its_questions_by_place(tmp_path, capsys):
    questions = write_ground(tmp_path, 3)[4]
    with openai_server.endpoint(lambda body, number: "Fine.") as server:
        config = {"model": f"{server.url}#mine", "output": str(tmp_path / "mine.jsonl"), "max_tokens": 7}
        (tmp_path / "answer.yaml").write_text(yaml.safe_dump(config))
        assert cli.main(["answer", questions, "--config", str(tmp_path / "answer.yaml")]) == 0
        assert [request["max_tokens"] for request in server.requests] == [7] * 3
    rows = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == ["q0", "q1", "q2"]


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["judge", "--anwsers", "a.jsonl"], 2, "unknown key 'anwsers'; the nearest valid one is 'answers'"),
        (["judge", "--mode", "triple"], 2, "mode: expected one of pairwise, single, got 'triple'"),
        (["judge", "--max_tokens", "many"], 2, "max_tokens: expected a whole number, got 'many'"),
        (["judge", "--judge", "http://x/v1#j"], 1, "give --answers FILE"),
        (["judge", "--reviews", "x", "--difference", "50"], 1, "--difference must be between 0 and 50 points"),
        (["answer", "-o", "a.jsonl"], 2, "model: missing"),
        (["answer", "--model", "x", "-o", "a.jsonl", "--temprature", "1"], 2, "the nearest valid one is 'temperature'"),
        (["answer", "--model", "x", "-o", "a.jsonl", "--temperature", "-1"], 1, "--temperature must be at least 0"),
        (["answer", "--model", "x", "-o", "a.jsonl", "--rpm", "-1"], 1, "--rpm and --tpm not below 0"),
        (["answer", "--model", "x", "-o", "."], 1, "is a directory; -o names the file"),
        (["bench", "--model", "x"], 2, "data: missing"),
        (["bench", "--model", "x", "--data", "y", "--task", "bbh"], 2, "the nearest valid one is 'tasks'"),
        (["bench", "--model", "x", "--data", "y", "-o", "setup.cfg"], 1, "setup.cfg: is a file; -o names a directory"),
    ],
)
def test_a_users_mistake_is_one_line(argv, code, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.cfg").write_text("")
    assert cli.main(argv) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
