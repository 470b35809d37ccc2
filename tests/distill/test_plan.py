"""The plan: a function of queries, sample, messages and seed; every query that is not asked is counted with its reason."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.distilling import distill, plan, query, settings, write_lines
from hypothesis import given as for_all
from hypothesis import strategies as st

from fastft.distill.plan import make_plan
from fastft.distill.queries.sample import algorithm_1, chosen, per_task_counts
from fastft.distill.settings import DistillConfig, TeacherConfig
from fastft.distill.system_messages import ORCA, load_messages
from fastft.errors import UserError

DATA = Path(os.environ.get("FASTFT_DATA", "data")) / "orca"
real = pytest.mark.skipif(not DATA.is_dir(), reason="NOT CHECKED HERE: FASTFT_DATA has no orca/")
TEACHER = {"name": "first", "url": "http://127.0.0.1:9/v1", "model": "small"}


def config(tmp_path: Path, **given) -> DistillConfig:
    made = {"queries": str(tmp_path / "queries.jsonl"), "output": str(tmp_path / "run"), "messages": "none", **given}
    return DistillConfig(**{"teachers": [TeacherConfig(**TEACHER)], **made})


def planned(tmp_path: Path, **given) -> list[dict]:
    made = config(tmp_path, **given)
    account = make_plan(made, made.sources, tmp_path / "run/plan.jsonl")
    assert account.read == account.planned + sum(account.left_out.values())
    return plan(tmp_path)


@for_all(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(0, 700), st.integers(0, 5))
def test_algorithm_1_takes_so_many_and_no_more_than_there_are(sizes, total, seed):
    taken = algorithm_1(np.array(sizes), total, seed)
    assert taken.sum() == min(total, sum(sizes)) and (taken >= 0).all() and (taken <= sizes).all()


def test_algorithm_1_is_uniform_over_tasks_and_not_over_queries():
    """Against the algorithm as the paper writes it, one query at a time, over many seeds."""
    sizes, total, runs = [2, 5, 40, 400], 60, 400
    slow = np.zeros(4)
    random = np.random.default_rng(0)
    for _ in range(runs):
        left = list(sizes)
        for _ in range(total):
            left[random.choice([task for task in range(4) if left[task]])] -= 1
        slow += np.array(sizes) - left
    fast = sum(algorithm_1(np.array(sizes), total, seed) for seed in range(runs))
    assert fast[0] == slow[0] == 2 * runs and fast[1] == slow[1] == 5 * runs
    sd = np.sqrt(runs * 53 / 4)  # of a count of halves of 53 picks, over all runs
    assert abs(fast[2] - slow[2]) < 4 * np.sqrt(2) * sd and abs(fast[2] - runs * 26.5) < 4 * sd


def test_a_querys_chance_does_not_depend_on_its_place():
    ids = [f"q{number}" for number in range(400)]
    tasks = np.array([number % 2 for number in range(400)])
    counts = np.array([30, 50])
    taken = {id for id, is_taken in zip(ids, chosen(ids, tasks, counts, 1)) if is_taken}
    backwards = chosen(ids[::-1], tasks[::-1], counts, 1)
    assert {id for id, is_taken in zip(ids[::-1], backwards) if is_taken} == taken and len(taken) == 80
    assert {id for id, is_taken in zip(ids, chosen(ids, tasks, counts, 2)) if is_taken} != taken


@pytest.mark.slow
def test_the_plan_is_the_same_on_one_and_eight_workers(tmp_path):
    lines = [query(number, collection=("cot", "t0")[number % 2]) for number in range(3000)]
    lines.append(
        {
            **query(1),
            "id": "x",
            "query": "Which river runs through Vienna on its way to Budapest and the Black Sea, and how long is it?",
        }
    )
    write_lines(tmp_path / "queries.jsonl", lines)
    write_lines(tmp_path / "bench.jsonl", [{"question": lines[-1]["query"]}])
    teachers = [TeacherConfig(**TEACHER), TeacherConfig(**{**TEACHER, "name": "second", "model": "big"}, share=0.2)]
    given = {
        "teachers": teachers,
        "sample": {"cot": {"total": 700}, "t0": "all"},
        "messages": "orca",
        "against": [str(tmp_path / "bench.jsonl")],
    }
    made = {}
    for workers in (1, 8):
        (tmp_path / str(workers)).mkdir()
        made_with = config(tmp_path, workers=workers, **given)
        make_plan(made_with, made_with.sources, tmp_path / str(workers) / "plan.jsonl")
        made[workers] = [(tmp_path / str(workers) / name).read_bytes() for name in ("plan.jsonl", "plan.json")]
    assert made[1] == made[8] and made[1][0].count(b"\n") == 2200


def test_every_query_that_is_not_asked_has_its_reason(tmp_path):
    queries = [query(number) for number in range(6)]
    queries += [
        queries[0],
        {"id": "empty", "query": " "},
        "A prompt and nothing else",
        {**query(7), "_template_type": "fs_opt"},
    ]
    queries += [
        {
            **query(9),
            "query": "In which year did the old bridge over the wide river at the northern town fall into the water?",
        }
    ]
    path = write_lines(tmp_path / "queries.jsonl", queries)
    path.write_text(path.read_text() + '{"id": "cut", "query": "a\n')
    write_lines(
        tmp_path / "bench.jsonl",
        [
            {
                "question": "the year in which did the old bridge over the wide river at the northern town fall into the water"
            }
        ],
    )
    made = config(tmp_path, against=[str(tmp_path / "bench.jsonl")], sample={"mine": {"total": 4}, "queries": "all"})
    account = make_plan(made, made.sources, tmp_path / "run/plan.jsonl")
    assert account.left_out == {
        "the same id and text again": 1,
        "without a query": 1,
        "few-shot": 1,
        "shares text with bench": 1,
        "unreadable: not JSON": 1,
        "not sampled": 2,
    }
    assert (account.read, account.planned) == (12, 5) and account.examples["few-shot"] == ["queries.jsonl: line 10"]
    [own] = [row for row in plan(tmp_path) if row["collection"] == "queries"]
    assert own["id"].startswith("q-") and own["query"] == "A prompt and nothing else"


def test_an_id_that_is_missing_is_made_of_the_text(tmp_path):
    write_lines(tmp_path / "queries.jsonl", ["one", "two"])
    ids = {row["query"]: row["id"] for row in planned(tmp_path)}
    write_lines(tmp_path / "queries.jsonl", ["two", "three", "one"])
    again = {row["query"]: row["id"] for row in planned(tmp_path)}
    assert ids["one"] == again["one"] and ids["two"] == again["two"] and len(set(again.values())) == 3


@pytest.mark.parametrize(
    "row, query, gold, options, system",
    [
        ({"inputs": "Is it?", "targets": "yes", "_task_source": "P3", "_task_name": "t"}, "Is it?", "yes", [], None),
        ({"instruction": "Add", "input": "1 and 2", "output": "3"}, "Add\n\n1 and 2", "", [], None),
        ({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]}, "Hi", "", [], "S"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "Hi", "", [], None),
        (
            {"question": "Which?\nOptions:\n(A) a\n(B) b", "answer": "B"},
            "Which?\nOptions:\n(A) a\n(B) b",
            "B",
            ["(A) a", "(B) b"],
            None,
        ),
        ({"prompt": "x or y?", "options": ["x", "y"], "gold": "y"}, "x or y?", "y", ["x", "y"], None),
        (
            {"question": "Which?", "choices": ["one", "two"], "answer": "B"},
            "Which?\nOptions:\n(A) one\n(B) two",
            "B",
            ["(A) one", "(B) two"],
            None,
        ),
        (
            {"question": "Which?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answer": ""},
            "Which?\nOptions:\n(A) one\n(B) two",
            "",
            ["(A) one", "(B) two"],
            None,
        ),
    ],
)
def test_rows_of_usual_shapes_are_read(tmp_path, row, query, gold, options, system):
    write_lines(tmp_path / "queries.jsonl", [row])
    [made] = planned(tmp_path)
    assert (made["query"], made["gold"], made["options"]) == (query, gold, options)
    assert (made["message"], made["system"]) == (("own", system) if system else ("none", ""))
    assert made["collection"] == ("t0" if "_task_source" in row else "queries")


@pytest.mark.slow
def test_a_directory_of_parquet_is_a_dataset(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "owner/flan").mkdir(parents=True)
    pq.write_table(pa.table({"inputs": ["a?", "b?"], "targets": ["x", "y"]}), tmp_path / "owner/flan/train.parquet")
    monkeypatch.chdir(tmp_path)
    rows = planned(tmp_path, queries="owner/flan")
    assert [(row["query"], row["gold"], row["collection"]) for row in rows] == [
        ("a?", "x", "flan"),
        ("b?", "y", "flan"),
    ]


def test_shares_are_exact_and_smaller_ones_lie_inside_larger_ones(tmp_path):
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(200)])
    teachers = [
        TeacherConfig(**{**TEACHER, "name": name, "model": name}, share=share)
        for name, share in (("a", 1), ("b", 0.5), ("c", 0.2))
    ]
    asked = [set(row["teachers"]) for row in planned(tmp_path, teachers=teachers)]
    assert Counter(name for each in asked for name in each) == {"a": 200, "b": 100, "c": 40}
    assert all("b" in each for each in asked if "c" in each)


def test_messages_are_drawn_by_weight_and_condition(tmp_path):
    own = {
        "messages": {"none": "", "long": "At length.", "pick": "Pick."},
        "collections": {"default": [{"when": "multiple_choice", "use": ["pick"]}, {"use": {"none": 1, "long": 3}}]},
    }
    (tmp_path / "own.yaml").write_text(json.dumps(own))
    lines = [query(number, multiple_choice=number % 3 == 0) for number in range(3000)]
    write_lines(tmp_path / "queries.jsonl", lines)
    rows = planned(tmp_path, messages=str(tmp_path / "own.yaml"))
    drawn = Counter(row["message"] for row in rows)
    assert drawn["pick"] == 1000 and abs(drawn["long"] - 1500) < 4 * (2000 * 3 / 16) ** 0.5
    # The draw of a query does not change if others come or go.
    write_lines(tmp_path / "queries.jsonl", lines[::2])
    again = {row["id"]: row["message"] for row in planned(tmp_path, messages=str(tmp_path / "own.yaml"))}
    assert all(again.get(row["id"], row["message"]) == row["message"] for row in rows) and len(again) == 1500


def test_a_plan_is_made_again_only_if_something_has_changed(tmp_path):
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(9)])
    planned(tmp_path)
    path = tmp_path / "run/plan.jsonl"
    first, written = path.stat().st_ino, path.read_bytes()
    planned(tmp_path)
    assert path.stat().st_ino == first
    assert planned(tmp_path, seed=1) and path.read_bytes() == written and path.stat().st_ino != first


def wrong(tmp_path: Path, what: str) -> dict:
    """Settings with one thing wrong."""
    base = settings(tmp_path)
    own = {"messages": {"a": "A"}, "collections": {"other": ["a"]}}
    (tmp_path / "own.yaml").write_text(
        json.dumps(own | ({"collections": {"mine": ["b"]}} if what == "no such message" else {}))
    )
    changes = {
        "no file": {"queries": str(tmp_path / "none.jsonl")},
        "a collection without messages": {"messages": str(tmp_path / "own.yaml")},
        "orca knows no such collection": {"messages": "orca"},
        "no such message": {"messages": str(tmp_path / "own.yaml")},
        "no such file of messages": {"messages": str(tmp_path / "none.yaml")},
        "a rule for no collection": {"sample": {"cot": "all"}},
        "a rule that is none": {"sample": {"mine": {"per_tsak": 3}}},
        "two teachers of one name": {"teachers": base["teachers"] * 2},
        "a share above 1": {"teachers": [{**base["teachers"][0], "share": 20}]},
        "money without a price": {"max_usd": 3},
        "no such check": {"verify": {"gold": "letters"}},
        "a key that is not known": {"verify": {"golden": "none"}},
        "a benchmark that is missing": {"against": [str(tmp_path / "none.jsonl")]},
        "nothing left": {"sample": {"mine": "none"}},
        "two teachers that are one": {"teachers": [base["teachers"][0], {**base["teachers"][0], "name": "second"}]},
        "a parameter of ours": {"teachers": [{**base["teachers"][0], "parameters": {"messages": []}}]},
        "a key that the trainer does not know": {"student": {"train": {"optimiser": {"lr": 1e-5}}}},
    }
    return {**base, **changes.get(what, {})}


@pytest.mark.parametrize(
    "what, line",
    [
        ("no file", "none.jsonl: no such file of queries, and no name on the Hub"),
        ("two texts with one id", "queries.jsonl: line 3: another query has the id 'q1', too"),
        ("a collection without messages", "own.yaml has none for the collection 'mine' (it knows other); add it there"),
        ("orca knows no such collection", "orca has none for the collection 'mine' (it knows cot, niv2, t0, flan2021)"),
        ("no such message", "own.yaml: mine: there is no message 'b' (there are a)"),
        ("no such file of messages", "none.yaml: cannot be read (No such file or directory)"),
        ("a rule for no collection", "sample: no query is of the collection 'cot' (there are mine)"),
        ("a rule that is none", "sample: mine: {'per_tsak': 3} is not all, none, or {per_task: N, total: N}"),
        ("two teachers of one name", "teachers: two of them are called 'first'"),
        ("a share above 1", "teachers: first: share: 20.0 is not above 0 and at most 1"),
        ("money without a price", "max_usd: first has no usd_per_million; [0, 0] says that it is free"),
        ("no such check", "verify: gold: letters is not one of"),
        ("a key that is not known", "unknown key 'verify.golden'; the nearest valid one is 'verify.gold'"),
        ("a benchmark that is missing", "none.jsonl: no such file"),
        ("nothing left", "no query is left to ask: 3 not sampled"),
        ("two teachers that are one", "teachers: first and second would be sent the same requests (model small, equal"),
        ("a parameter of ours", "teachers: first: parameters: messages is set by distill itself"),
        ("a key that the trainer does not know", "student: train: unknown key 'optimiser.lr'; the nearest"),
    ],
)
def test_bad_input_is_one_clear_line_before_anything_is_asked(tmp_path, what, line):
    queries = [query(1), query(2), query(3)]
    if what == "two texts with one id":
        queries[2]["id"] = "q1"
    write_lines(tmp_path / "queries.jsonl", queries)
    with pytest.raises(UserError) as caught:
        distill(tmp_path, **wrong(tmp_path, what))
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_tables_are_read(tmp_path):
    (tmp_path / "t.csv").write_text('\ufeffid,query,gold\n1,"How many, all in all?",4\n2,Why?,\n', encoding="utf-8")
    made = config(tmp_path, queries=str(tmp_path / "t.csv"))
    make_plan(made, made.sources, tmp_path / "run/plan.jsonl")
    assert [(row["id"], row["query"], row["gold"]) for row in plan(tmp_path)] == [
        ("1", "How many, all in all?", "4"),
        ("2", "Why?", ""),
    ]


@pytest.mark.slow
def test_a_file_that_changes_in_a_directory_is_a_new_plan(tmp_path):
    (tmp_path / "d").mkdir()
    made = config(tmp_path, queries=str(tmp_path / "d"))
    for count in (2, 3):
        write_lines(tmp_path / "d/a.jsonl", [query(number) for number in range(count)])
        assert make_plan(made, made.sources, tmp_path / "run/plan.jsonl").planned == count


def test_a_dry_run_says_what_it_would_take_and_leaves_nothing(tmp_path, capsys):
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(1000)] + [{**query(1), "id": "again"}])
    prices = {"teacher_usd_per_million": [0.5, 1.5], "teacher_rpm": 300, "teacher_tpm": 0, "teacher_reply_tokens": 200}
    given = settings(tmp_path, **prices)
    given["teachers"].append(
        {
            "name": "second",
            "url": ["http://127.0.0.1:9/v1", "http://127.0.0.1:8/v1"],
            "model": "big",
            "share": 0.2,
            "tpm": 10_000,
        }
    )
    assert distill(tmp_path, "--dry_run", **given) == 0
    said = capsys.readouterr().out
    assert "mine: 1,001 of 1,001 queries in 3 tasks" in said
    # 1,000 calls at 300 a minute; 201 calls of 1,024 + 8 or 9 tokens at 2 x 10,000 a minute
    assert (
        "first: 1,000 calls (0 answered already, 1 equal requests)" in said and "at least 3 minutes (rpm 300)" in said
    )
    assert (
        "about 200,000 reply tokens (at most 1,024,000), about $0.30 (at most $1.54; by batch files about $0.15)"
        in said
    )
    assert "at least 10 minutes (tpm 10,000 x 2 addresses)" in said
    assert not (tmp_path / "run").exists()
    reserve = tmp_path / "run/answers.reserve"  # of a run that is at work there meanwhile
    reserve.parent.mkdir()
    reserve.touch()
    assert distill(tmp_path, "--dry_run", **given) == 0 and reserve.exists()


# --- The published numbers --------------------------------------------------------------------------------------------


@real
def test_orcas_samples_come_out():
    sizes = json.loads((DATA / "task_sizes.json").read_text())
    niv2, t0 = (np.array(list(sizes[name].values())) for name in ("niv2", "t0"))
    assert (niv2.sum(), per_task_counts(niv2, {"per_task": 300}, 0).sum()) == (5_163_933, 460_255)
    for seed in range(3):
        taken = algorithm_1(t0, 200_000, seed)
        used_up = taken == t0
        left = taken[~used_up]
        assert (taken.sum(), used_up.sum()) == (200_000, 21)
        # The counts of the other tasks are as of equal chances: mean and spread, and none far off.
        assert abs(left.mean() - 305.6) < 3 * 305.6**0.5 / len(left) ** 0.5
        assert 0.8 < left.var() / 305.6 < 1.2 and abs(left - 305.6).max() < 4.5 * 305.6**0.5


@real
@pytest.mark.slow
def test_messages_are_drawn_as_in_the_open_reproduction(tmp_path):
    """100,000 planned rows in its proportions: in each collection the shares are its shares, and those of equal chances."""
    from scipy.stats import chisquare

    published = json.loads((DATA / "system_messages.json").read_text())
    parts = {"cot": 74_172, "niv2": 89_127, "t0": 330_647, "flan2021": 474_541, "flan2021_multiple_choice": 26_530}
    rows, whole = [], sum(parts.values())
    for name, part in parts.items():
        count, collection = round(100_000 * part / whole), name.removesuffix("_multiple_choice")
        rows += [
            {
                "id": f"{name}.{n}",
                "collection": collection,
                "query": f"{name} {n}",
                "multiple_choice": collection != name,
            }
            for n in range(count)
        ]
    write_lines(tmp_path / "queries.jsonl", rows)
    drawn: dict[str, Counter] = {name: Counter() for name in parts}
    for row in planned(tmp_path, messages="orca", seed=0):
        drawn[row["id"].rpartition(".")[0]][int(row["message"].removeprefix("orca_"))] += 1
    for name, counts in drawn.items():
        assert sorted(counts) == published["sets"][name]
        assert chisquare(list(counts.values())).pvalue > 0.01
    # All together against the published counts of each message, as two samples.
    ours = np.array([sum(counts[number] for counts in drawn.values()) for number in range(1, 17)])
    theirs = np.array([published["openorca_gpt4_counts"][str(number)] for number in range(1, 17)])
    expected = (ours + theirs) * ours.sum() / (ours.sum() + theirs.sum())
    statistic = ((ours - expected) ** 2 / expected).sum() * (1 + ours.sum() / theirs.sum())
    from scipy.stats import chi2

    assert chi2.sf(statistic, 15) > 0.01


def test_the_default_messages_have_orcas_map_in_our_own_words():
    sets = {
        "cot": [6, 11, 16],
        "niv2": [1, 2, 5, 7, 9, 12, 13, 14, 15],
        "t0": [1, 2, 3, 5, 7],
        "flan2021": [3, 4, 7],
        "flan2021 (multiple choice)": [8, 10],
    }
    messages = load_messages("orca")
    assert len(messages.texts) == 16 and messages.texts["orca_01"] == "" and ORCA.is_file()
    for name, numbers in sets.items():
        collection, is_choice = name.removesuffix(" (multiple choice)"), "(" in name
        names = {messages.drawn(0, str(id), collection, is_choice)[0] for id in range(500)}
        assert names == {f"orca_{number:02}" for number in numbers}
    # In every collection but Flan 2021 the condition changes nothing.
    assert messages.drawn(0, "x", "cot", True) == messages.drawn(0, "x", "cot", False)


@real
def test_the_default_messages_are_not_copies():
    published = json.loads((DATA / "system_messages.json").read_text())["messages"]
    ours = load_messages("orca").texts
    for number, text in published.items():
        theirs, own = text.split(), f" {' '.join(ours[f'orca_{int(number):02}'].split())} "
        same = [" ".join(theirs[at : at + 8]) for at in range(len(theirs) - 7)]
        copied = [piece for piece in same if f" {piece} " in own]
        assert not copied


@real
def test_the_real_queries_are_planned(tmp_path):
    (tmp_path / "queries.jsonl.gz").write_bytes((DATA / "queries.jsonl.gz").read_bytes())
    rows = planned(tmp_path, queries=str(tmp_path / "queries.jsonl.gz"), messages="orca")
    with gzip.open(DATA / "queries.jsonl.gz") as file:
        given = list(map(json.loads, file))
    assert [row["id"] for row in rows] == [row["id"] for row in given]
    choice = [(row, row_given) for row, row_given in zip(rows, given) if row_given["multiple_choice"]]
    assert len(choice) == 922 and all(len(row["options"]) >= 2 for row, _ in choice)
