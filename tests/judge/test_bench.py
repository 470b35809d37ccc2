"""Exams: the items of BBH and AGIEval, the rules that read an answer, and the harness over real HTTP and with a real model."""

import json
import sys

import pytest
from helpers import models, openai_server
from helpers.openai_server import Failure
from hypothesis import given
from hypothesis import strategies as st

from fastft import cli
from fastft.inference.endpoint import KEY
from fastft.judge.exams.items import MODELS, chosen, first_capital, load_items, lone_letter, published, score

LETTERED = "Which is heavy?\nOptions:\n(A) a feather\n(B) an anvil\n(C) a crumb"


def run_bench(arguments: list[str]) -> int:
    """Run `fastft bench` and return its exit code."""
    return cli.main(["bench", *arguments])


def exam(task):
    return chosen(task)[0]


def write_bbh(directory, task, *examples):
    (directory / "bbh").mkdir(exist_ok=True)
    rows = [{"input": question, "target": target} for question, target in examples]
    (directory / "bbh" / f"{task}.json").write_text(json.dumps({"canary": "…", "examples": rows}))


def write_agieval(directory, task, *rows):
    (directory / "agieval").mkdir(exist_ok=True)
    (directory / "agieval" / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_published_columns_have_the_averages_that_the_paper_quotes():
    rows = published()
    assert [
        (sum(r.suite == s for r in rows), sum(r.items for r in rows if r.suite == s)) for s in ("bbh", "agieval")
    ] == [
        (23, 5508),  # 5,511 less the three malformed ones
        (8, 2546),
    ]
    means = {
        (suite, model): sum(r.accuracy[model] or 0 for r in rows if r.suite == suite)
        / sum(r.suite == suite for r in rows)
        for suite in ("bbh", "agieval")
        for model in MODELS
    }
    expected = {"Vicuna": (23.3, 29.3), "Orca": (49.7, 41.7), "ChatGPT": (48.9, 47.2), "GPT-4": (67.4, 62.0)}
    for model, (bbh, agieval) in expected.items():
        assert (round(means["bbh", model], 1), round(means["agieval", model], 1)) == (bbh, agieval)
    assert round(means["agieval", "TD-003"], 1) == 41.9
    assert rows[0].accuracy["TD-003"] is None


@pytest.mark.parametrize(
    ("task", "question", "target", "letters", "gold", "shown"),
    [
        ("snarks", LETTERED, "(B)", "ABC", "B", "(C) a crumb\n\nAnswer with"),
        ("navigate", "Go.\nOptions:\n- Yes\n- No", "No", "AB", "B", "Go.\nOptions:\n(A) Yes\n(B) No\n"),
        ("formal_fallacies", "So?\nOptions:\n- valid \n- invalid", "invalid", "AB", "B", "(A) valid\n(B) invalid\n"),
        ("boolean_expressions", "not True is", "False", "AB", "B", "not True is\nOptions:\n(A) True\n(B) False\n"),
        ("web_of_lies", "Does Ann lie?", "Yes", "AB", "A", "(A) Yes\n(B) No"),
        ("sports_understanding", "Plausible?", "no", "AB", "B", "(A) yes\n(B) no"),
    ],
)
def test_every_shape_of_bbh_gets_letters(tmp_path, task, question, target, letters, gold, shown):
    write_bbh(tmp_path, task, (question, target))
    (item,), skipped = load_items(tmp_path, exam(task))
    assert (item.options, item.gold, skipped) == (letters, gold, [])
    assert shown in item.prompt


def test_agieval_items_are_read_and_those_without_an_answer_skipped(tmp_path):
    rows = [
        {"passage": "A text.", "question": "2 + 2?", "options": ["(A)3", "(B)4", "(C) 5"], "label": "B"},
        {"passage": None, "question": "1 + 1?", "options": ["2", "3"], "label": "A"},
        {"passage": "", "question": "none", "options": ["(A)2", "(B)3"], "label": "E"},
        {"passage": "", "question": "open", "options": None, "label": None},
    ]
    write_agieval(tmp_path, "aqua-rat", *rows)
    items, skipped = load_items(tmp_path, exam("aqua-rat"))
    assert [(item.options, item.gold) for item in items] == [("ABC", "B"), ("AB", "A")]
    assert items[0].prompt.startswith("A text.\n\n2 + 2?\nOptions:\n(A) 3\n(B) 4\n(C) 5\n\nAnswer with")
    assert items[1].prompt.startswith("1 + 1?\nOptions:\n(A) 2\n")
    assert [line.partition(":")[0] for line in skipped] == ["aqua-rat[2]", "aqua-rat[3]"]


def test_malformed_items_are_named_and_left_out(tmp_path):
    """BBH itself has targets that are texts, and options that a comma has torn apart."""
    bad = LETTERED.replace("(C)", "(D)")
    write_bbh(tmp_path, "ruin_names", (LETTERED, "(A)"), (LETTERED, "an anvil"), (bad, "(A)"), (LETTERED, "(D)"))
    items, skipped = load_items(tmp_path, exam("ruin_names"))
    assert len(items) == 1
    assert skipped == [
        "ruin_names[1]: its target 'an anvil' is none of its options ABC",
        "ruin_names[2]: its options are ABD",
        "ruin_names[3]: its target '(D)' is none of its options ABC",
    ]


@pytest.mark.parametrize(
    ("answer", "first", "lone"),
    [
        ("(B)", "B", "B"),
        ("The answer is (C).", "C", "C"),
        ("Answer: B", "A", "B"),
        ("b", None, None),
        ("", None, None),
        ("E, no, C", "C", "C"),  # E is no option
        ("Bob says C", "B", "C"),
        ("A_B", "A", "A"),
    ],
)
def test_both_rules_of_reading_an_answer(answer, first, lone):
    assert (first_capital(answer, "ABC"), lone_letter(answer, "ABC")) == (first, lone)


@given(st.text(), st.sampled_from(["AB", "ABC", "ABCDE"]))
def test_a_letter_that_is_read_is_an_option(text, options):
    for found in (first_capital(text, options), lone_letter(text, options)):
        assert found is None or (found in text and found in options)
    assert (first_capital(text, options) is None) == (not set(options) & set(text))
    assert sum(score({"options": options, "gold": letter}, [text])["first_capital"] for letter in options) <= 1


@pytest.fixture
def exams(tmp_path):
    questions = [(LETTERED.replace("heavy", f"heavy, number {n}"), "(B)") for n in range(6)]
    write_bbh(tmp_path, "snarks", *questions, (LETTERED, "an anvil"))
    write_bbh(tmp_path, "web_of_lies", *[(f"Does number {n} lie?", ("Yes", "No")[n % 2]) for n in range(4)])
    write_agieval(
        tmp_path,
        "sat-math",
        *[{"question": f"{n} + 1?", "options": ["(A)0", f"(B){n + 1}"], "label": "B"} for n in range(5)],
    )
    return tmp_path


def answers_b(body, number=0):
    return "A dog barks; Answer: (B)" if "Which is heavy" in body["messages"][0]["content"] else "(B)"


def test_a_run_over_http_with_its_files(exams, monkeypatch, capsys):
    """Failures leave questions unanswered, with exit code 1; the same command asks only those. Then every figure is checked."""
    monkeypatch.setenv(KEY, "sk-secret-secret")
    out = exams / "out"
    command = [
        "--tasks",
        "snarks,web_of_lies,agieval/sat-math",
        "--data",
        str(exams),
        "-o",
        str(out),
        "--name",
        "<i>me",
    ]
    broken = lambda body, n: n < 15 and "number 3" in body["messages"][0]["content"]  # noqa: E731
    with openai_server.endpoint(lambda body, n: Failure(400, "no") if broken(body, n) else answers_b(body)) as server:
        assert run_bench([*command, "--model", f"{server.url}#m", "--concurrency", "2"]) == 1
        assert len(server.requests) == 15
        assert "2 of 15 questions are not answered" in capsys.readouterr().err
        assert run_bench([*command, "--model", f"{server.url}#m"]) == 0
        assert len(server.requests) == 15 + 2
        assert all(len(body["messages"]) == 1 for body in server.requests)  # no system message, no examples
    shown = capsys.readouterr()
    assert "skipped: snarks[6]: its target 'an anvil' is none of its options ABC" in shown.err
    results = json.loads((out / "results.json").read_text())
    by_task = {each["exam"]["task"]: each for each in results["tasks"]}
    assert {task: (each["items"], each["accuracy"], each["lone_letter"]) for task, each in by_task.items()} == {
        "snarks": (6, 0.0, 0.0),  # "A dog barks; Answer: (B)" begins with A, by both rules
        "web_of_lies": (4, 50.0, 50.0),
        "sat-math": (5, 100.0, 100.0),
    }
    assert by_task["web_of_lies"]["low"] == pytest.approx(15.0, abs=0.05)  # Wilson, 2 of 4
    assert by_task["web_of_lies"]["high"] == pytest.approx(85.0, abs=0.05)
    assert results["skipped"] == ["snarks[6]: its target 'an anvil' is none of its options ABC"]
    bbh = results["averages"][0]
    assert (bbh["suite"], bbh["accuracy"], bbh["tasks"]) == ("bbh", 25.0, 2)
    assert bbh["published"]["ChatGPT"] == pytest.approx((59.0 + 56.0) / 2)
    assert 0 <= bbh["low"] < 25 < bbh["high"] <= 60
    table = (out / "results.md").read_text()
    assert "| snarks | 6 | 0.0 |" in table
    assert "59.0" in table  # ChatGPT's
    assert "snarks has 7" in table  # not Orca's 178
    page = (out / "report.html").read_text()
    assert "&lt;i&gt;me" in page
    assert "<i>me" not in page
    assert "sk-secret" not in page + table + shown.out + shown.err


def test_a_local_model_and_the_harness_itself(exams, capsys):
    """A model's directory is examined, and then the harness runs its own dummy model over the task files."""
    model = models.make_model(exams / "model")
    command = [
        "--tasks",
        "bbh/snarks",
        "--data",
        str(exams),
        "-o",
        str(exams / "out"),
        "--max_tokens",
        "4",
        "--limit",
        "3",
    ]
    assert run_bench([*command, "--model", str(model), "--dry_run"]) == 0
    assert "would ask 3 turns" in capsys.readouterr().out
    assert not (exams / "out" / "answers.jsonl").exists()
    assert run_bench([*command, "--model", str(model)]) == 0
    assert "a trial run, not a result" in capsys.readouterr().out
    lines = (exams / "out" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in lines] == [f"fastft_bbh_snarks:{n}" for n in range(3)]
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(exams / "out" / "tasks"), include_defaults=False)
    found = simple_evaluate(model="dummy", tasks=["fastft_bbh_snarks"], task_manager=manager)["results"]
    # it says "lol" to everything
    assert [found["fastft_bbh_snarks"][f"{name},none"] for name in ("first_capital", "no_letter")] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "snark"], "--tasks snark: there are the suites bbh, agieval and the tasks boolean"),
        (["--tasks", ","], "--tasks is empty"),
        (["--tasks", "navigate"], "navigate.json: no such file; it comes from github.com/suzgunmirac"),
        (["--tasks", "lsat-ar"], "lsat-ar.jsonl: no such file; it comes from github.com/ruixiangcui"),
        (["--tasks", "hyperbaton"], "is not a JSON object with examples"),
        (
            ["--tasks", "causal_judgement"],
            "holds no multiple-choice questions (causal_judgement[0]: its options are missing)",
        ),
        (["--tasks", "snarks", "--limit", "0"], "--limit must be at least 1"),
        (["--tasks", "snarks", "--max_tokens", "0"], "--max_tokens must be at least 1"),
        (["--tasks", "snarks", "--model", "nothing/here"], "nothing/here"),
    ],
)
def test_mistakes_are_one_line(exams, capsys, options, said):
    (exams / "bbh" / "hyperbaton.json").write_text("[]")
    write_bbh(exams, "causal_judgement", ("why?", "Because"))
    command = ["--data", str(exams), "-o", str(exams / "out"), "--model", "http://127.0.0.1:9#x", *options]
    assert run_bench(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error


def test_a_package_that_is_not_installed_is_named_before_anything_is_asked(exams, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    assert run_bench(["--data", str(exams), "-o", str(exams / "out"), "--model", "http://127.0.0.1:9#x"]) == 1
    assert capsys.readouterr().err == "error: lm_eval is missing: pip install 'fastft[bench]'\n"
    assert not (exams / "out").exists()
