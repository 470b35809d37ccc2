"""Verification: what an answer says is read where answers stand, and each reason to keep it out is right."""

import gzip
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from helpers import openai_server
from helpers.distilling import distill, kept, ledger, query, rejected, right, rows, settings, write_lines

from fastft.distill.settings import VerifyConfig
from fastft.distill.verify.checks import compare_with_gold, extracted, look_at
from fastft.errors import UserError
from fastft.judge.exams.gold import kind_of_gold, number_in
from fastft.judge.exams.options import chosen_option, index_of, options_in

DATA = Path(os.environ.get("FASTFT_DATA", "data")) / "orca"
real = pytest.mark.skipif(not DATA.is_dir(), reason="NOT CHECKED HERE: FASTFT_DATA has no orca/")


@pytest.mark.parametrize(
    "text, options",
    [
        ("How much?\nOptions:\n(A) 66\n(B) 74", ["(A) 66", "(B) 74"]),
        ("Is it?\nOPTIONS:\n- yes\n- no", ["yes", "no"]),
        ("Choose your answer from:\n[A]. negative;\n[B]. positive;\nAnswer:", ["[A]. negative", "[B]. positive"]),
        ("Select from:\n (1). Yes;\n (2). No;", ["(1). Yes", "(2). No"]),
        ("Why? Options:  A. a cake  B. not said  C. both\nAnswer:", ["A. a cake", "B. not said", "C. both"]),
        (
            "Available options: a). Yes b). Perhaps c). No\nI think",
            ["a). Yes", "b). Perhaps", "c). No"],
        ),
        ("Options: none are given, so answer freely.", []),
        ("Note: this is a text\nabout options: they exist.", []),
        ("", []),
    ],
)
def test_options_are_found_as_they_are_written(text, options):
    assert options_in(text) == options


LETTERS = ["(A) a stream", "(B) the sea", "(C) a pond", "(D) the sea bed"]


@pytest.mark.parametrize(
    "answer, options, found",
    [
        ("(B)", LETTERS, 1),
        ("B", LETTERS, 1),
        ("B. the sea\n\nFish live in (A) and (C), too.", LETTERS, 1),
        ("A fish needs water. (A) and (B) are wet.\nTherefore, the answer is (C), not (A).", LETTERS, 2),
        ("The answer is (A).\nNo, wait: the correct answer is **(D)**.", LETTERS, 3),
        ("It is the sea bed.", LETTERS, 3),
        ("Both (A) and (B) could be right.", LETTERS, None),
        ("A fish swims.", LETTERS, None),
        ("I would take B here", LETTERS, 1),
        ("- the sea\n- a pond\n- the sea\n- a pond", LETTERS, None),
        ("the sea\n\nIt is the largest.\n(A) and (C) are small.", LETTERS, 1),
        ("I don't know.", LETTERS, None),
        ("Because it is so.\nAnswer: no", ["yes", "no"], 1),
        ("Yes, it is. No doubt.", ["yes", "no"], None),
        ("So the sentiment is very positive.", ["positive", "very positive", "negative"], 1),
        ("", LETTERS, None),
    ],
)
def test_the_option_that_an_answer_names_is_found_where_answers_stand(answer, options, found):
    assert chosen_option(answer, options) == found


def test_an_option_is_meant_by_its_label_its_text_or_its_beginning():
    assert [index_of(gold, LETTERS) for gold in ("(C)", "C", "the sea", "The sea bed.", "E", "")] == [
        2,
        2,
        1,
        3,
        None,
        None,
    ]
    assert index_of("Sentence A", ['Sentence A: "I run"', 'Sentence B: "I fly"']) == 0


@pytest.mark.parametrize(
    "text, found",
    [
        ("12 and 30 make 42.", 42),
        ("The answer is $1,200.50 in all, after 3 days.", 1200.5),
        ("#### 7", 7),
        ("42\n\nBecause 40 + 2 = 42, and 3 is odd.", 42),
        (r"So \boxed{-5} it is, with 8 left.", -5),
        ("The answer is 4. Hence the answer is 5.", 5),
        ("None.", None),
    ],
)
def test_the_number_that_an_answer_gives_is_found(text, found):
    assert number_in(text) == found


def row(gold: str, options: list[str] = (), collection: str = "mine") -> dict:
    return {"gold": gold, "options": list(options), "collection": collection, "query": "?"}


@pytest.mark.parametrize(
    "gold, options, kind",
    [
        ("(A)", LETTERS, "choice"),
        ("a lake", LETTERS, "none"),  # no option: nothing can be said
        ("Yes", [], "choice"),
        ("B", [], "choice"),
        ("1,200", [], "number"),
        ("22 hours.", [], "text"),
        ("The old man went down to the sea", [], "none"),
    ],
)
def test_a_gold_answer_is_compared_by_its_kind(gold, options, kind):
    assert kind_of_gold(gold, options) == kind


@pytest.mark.parametrize(
    "gold, options, text, reason",
    [
        ("(A)", LETTERS, "The answer is (A).", ""),
        ("(A)", LETTERS, "The answer is (B).", "wrong answer"),
        ("(A)", LETTERS, "Who knows?", "no answer found"),
        ("no", [], "No, a dog does not.", ""),
        ("no", [], "Yes, it does.", "wrong answer"),
        ("22 hours.", [], "It took him 22 hours, I think.", ""),
        ("22 hours.", [], "It took him 122 hours.", "wrong answer"),
        ("3", [], "There are three.", "no answer found"),
        ("", [], "Anything.", ""),
    ],
)
def test_an_answer_is_right_wrong_or_not_to_be_found(gold, options, text, reason):
    verdict = compare_with_gold(row(gold, options), text, "auto")
    assert verdict.reason == reason and verdict.status == ("unverified" if reason else "kept")
    assert compare_with_gold(row(gold, options), text, "none").status == "kept"


def answer(text: str, **more) -> dict:
    return {"text": text, "finish_reason": "stop", "refused": False, "completion_tokens": 9, **more}


def test_each_check_can_be_switched_off():
    given = row("4"), answer("I'm sorry, but I cannot help with sums.", finish_reason="length")
    assert look_at(*given, VerifyConfig()).status == "cut"
    assert look_at(*given, VerifyConfig(cut="keep")).status == "refused"
    assert look_at(*given, VerifyConfig(cut="keep", refusals="keep")).reason == "no answer found"
    assert look_at(*given, VerifyConfig(cut="keep", refusals="keep", gold={"mine": "none"})).status == "kept"
    assert look_at(row(""), answer(""), VerifyConfig(empty="keep")).status == "kept"
    assert look_at(row(""), answer("x", refused=True), VerifyConfig()).reason == "the endpoint marks it as a refusal"
    assert look_at(row(""), answer("x", finish_reason="content_filter"), VerifyConfig()).status == "refused"


def test_a_cut_answer_that_is_kept_is_learned_without_its_end(tmp_path):
    write_lines(tmp_path / "queries.jsonl", [query(1)])
    with openai_server.endpoint(
        lambda body, n: openai_server.completion("It is 2, because\n\n", body, "length")
    ) as server:
        assert distill(tmp_path, **settings(tmp_path, server.url, verify={"cut": "keep", "gold": "none"})) == 0
    [row] = kept(tmp_path)
    assert row["messages"][-1] == {"role": "assistant", "content": "It is 2, because", "train": True, "ends": False}


@pytest.mark.slow
def test_near_duplicates_are_out_and_name_what_they_repeat(tmp_path):
    words = " ".join(f"{random.Random(n).choice(('river', 'bridge', 'town'))}{n}" for n in range(120))
    tails = ["and came home rich", "and came home very rich", " ".join(reversed(words.split()))]
    write_lines(tmp_path / "queries.jsonl", [{"id": f"q{n}", "query": f"Tell me of place {n}"} for n in range(3)])

    def reply(body, number):
        return f"{words} {tails[int(body['messages'][-1]['content'][-1])]}"

    with openai_server.endpoint(reply) as server:
        given = settings(tmp_path, server.url)
        assert distill(tmp_path, **given) == 0
        [(id, found)] = rejected(tmp_path).items()
        assert found == ("duplicate", "near duplicate") and id[0] in ("q0", "q1") and len(kept(tmp_path)) == 2
        assert re.match(r"of q[01], similarity 0\.\d\d$", rows(tmp_path / "run/rejected.jsonl")[0]["detail"])
        assert distill(tmp_path, **{**given, "verify": {"near": 0}}) == 0
        assert len(kept(tmp_path)) == len(server.requests) == 3, "verified again without asking again"


def test_teachers_that_disagree_are_both_kept_out(tmp_path):
    """Without gold answers: where both name an option and it is not the same one."""
    text = "Which is it, number {}?\nOptions:\n(A) a stream\n(B) the sea"
    write_lines(tmp_path / "queries.jsonl", [{"id": f"q{n}", "query": text.format(n)} for n in range(4)])
    letters = {"small": "ABA?", "big": "AAB?"}
    reply = lambda body, number: f"The answer is ({letters[body['model']][int(body['messages'][-1]['content'][20])]})."  # noqa: E731
    with openai_server.endpoint(reply) as server:
        given = settings(tmp_path, server.url, verify={"agreement": True, "near": 0})
        given["teachers"].append({"name": "second", "url": server.url, "model": "big"})
        assert distill(tmp_path, **given) == 0
    why = ("unverified", "the teachers disagree")
    assert rejected(tmp_path) == {(id, name): why for id in ("q1", "q2") for name in ("first", "second")}


@pytest.mark.slow
def test_a_judge_that_its_money_stops_says_so_and_counts_what_it_has_cost(tmp_path):
    """Its limit holds over all starts; with more money, the same command goes on."""
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(6)])

    def reply(body, number):
        return "Rating: [[8]]" if body["model"] == "judge" else right(body)

    with openai_server.endpoint(reply) as server:
        judge = {"url": server.url, "model": "judge", "max_tokens": 10, "usd_per_million": [1000, 1000], "max_usd": 1.8}
        given = settings(tmp_path, server.url, verify={"near": 0, "judge": judge})
        for _ in range(2):
            with pytest.raises(
                UserError, match=r"answers are missing \(judge: stopped before \$1.80 would be exceeded"
            ):
                distill(tmp_path, **given)
            judged = [body for body in server.requests if body["model"] == "judge"]
            assert 0 < len(judged) < 6 and 0 < ledger(tmp_path)["usd"] <= 1.8
            assert {why for why, _ in rejected(tmp_path).values()} == {"failed"}
        judge["max_usd"] = 100
        assert distill(tmp_path, **given) == 0
    assert ledger(tmp_path)["teachers"][0]["kept"] == 6


def test_a_judge_keeps_out_what_it_scores_low_and_is_paid_once(tmp_path):
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(6)])

    def reply(body, number):
        said = body["messages"][-1]["content"]
        if body["model"] == "small":
            return right(body)
        if "What is 5 " in body["messages"][0]["content"]:
            return "A fine answer."  # which the judge is told, and then asked again
        return json.dumps({"explanation": "so", "score": 3 if "What is 2 " in said else 8})

    with openai_server.endpoint(reply) as server:
        judge = {"url": server.url, "model": "judge", "least": 6}
        given = settings(tmp_path, server.url, verify={"judge": judge, "near": 0})
        for _ in range(2):
            assert distill(tmp_path, **given) == 0
            assert rejected(tmp_path) == {
                ("q2", "first"): ("unverified", "judged below 6"),
                ("q5", "first"): ("unverified", "the judge's score cannot be read"),
            }
        assert Counter(body["model"] for body in server.requests)["small"] == 6
        judged = [body for body in server.requests if body["model"] == "judge"]
        assert len({json.dumps(body) for body in judged}) == len(judged)


def test_the_student_sees_erased_messages_and_the_held_out_ones_without(tmp_path):
    own = {"messages": {"a": "At length."}, "collections": {"default": ["a"]}}
    (tmp_path / "own.yaml").write_text(json.dumps(own))
    write_lines(tmp_path / "queries.jsonl", [query(number) for number in range(60)])
    with openai_server.endpoint(right) as server:
        given = settings(tmp_path, server.url, messages=str(tmp_path / "own.yaml"), verify={"near": 0})
        given |= {"student": {"model": "m", "held_out": 0.2, "generic": "Be good.", "train": {"global_batch_size": 4}}}
        assert distill(tmp_path, "--erase_system", "0.5", **given) == 0
        asked = {body["messages"][0]["content"] for body in server.requests}
    assert asked == {"At length."}, "the teacher always sees its own message"
    systems = Counter(each["messages"][0]["content"] for each in kept(tmp_path))
    held_out = rows(tmp_path / "run/held_out/conversations.jsonl")
    assert set(systems) == {"Be good.", "At length."} and 12 <= systems["Be good."] <= 36
    assert [each["role"] for each in held_out[0]["messages"]] == ["user", "assistant"]
    assert not {each["id"] for each in held_out} & {each["id"] for each in kept(tmp_path)}
    assert len(held_out) + len(kept(tmp_path)) == 60
    stages = {each["stage"]: each for each in ledger(tmp_path)["stages"]}
    assert stages["first"]["erased"] == systems["Be good."] and stages["held out"]["conversations"] == len(held_out)
    from fastft.config import read_config

    train = read_config(tmp_path / "run/train.yaml")
    assert [stage.data for stage in train.stages] == [str(tmp_path / "run/stage1/conversations.jsonl")]
    assert (train.eval_data, train.global_batch_size) == (str(tmp_path / "run/held_out/conversations.jsonl"), 4)


# --- Real answers -----------------------------------------------------------------------------------------------------


@real
@pytest.mark.slow
def test_gold_answers_are_found_in_every_form_on_the_real_queries():
    """1,750 queries: the gold answer alone, in a sentence, after and before its rationale. Another one is never taken for it."""
    with gzip.open(DATA / "queries.jsonl.gz") as file:
        queries = list(map(json.loads, file))
    golds = {each["id"]: {**each, "options": options_in(each["query"])} for each in queries}
    compared, wrong = 0, Counter()
    for each in golds.values():
        gold = each["gold"]
        texts = [
            gold,
            f"Let me think.\n\nTherefore, the answer is {gold}.",
            f"{each['rationale']}\nSo the answer is {gold}",
        ]
        for text in (*texts, f"{gold}\n\nExplanation: {each['rationale']}"):
            verdict = compare_with_gold(each, text, "auto")
            compared += verdict.checked
            assert verdict.status == "kept", (each["id"], text, verdict)
        if each["options"] and (at := index_of(gold, each["options"])) is not None:
            other = each["options"][at - 1]
            verdict = compare_with_gold(each, f"{gold} is tempting.\nThe answer is {other}", "auto")
            wrong[verdict.reason] += 1
    assert compared == 4 * 1519
    assert wrong["wrong answer"] == wrong.total() == 935


@real
@pytest.mark.slow
def test_the_replay_of_two_real_teachers_comes_out_as_counted_by_hand(tmp_path):
    """142 real (system, query) pairs with a strong and a weak teacher's answers, through a scripted endpoint.

    Read by hand: 11 queries list options. In 14, 22, 26, 40, 88, 110 and 240 both teachers name the same one, in 132, 144 and
    216 another, and in 38 the weak one names none. One answer refuses (146, weak); 124 (strong) and 40 (weak) open with "As an
    AI"; so 40 is out before the two are compared. 162 (strong) says in its second sentence that it cannot complete the task and
    then does something else; nothing here finds that.
    """
    with gzip.open(DATA / "replay.jsonl.gz") as file:
        replay = list(map(json.loads, file))
    write_lines(
        tmp_path / "queries.jsonl", [{name: each[name] for name in ("id", "system", "query")} for each in replay]
    )
    said = {(each["system"], each["query"]): each for each in replay}

    def reply(body, number):
        system, asked = (each["content"] for each in body["messages"])
        return said[system, asked][body["model"]]

    with openai_server.endpoint(reply) as server:
        given = settings(tmp_path, server.url, verify={"agreement": True, "near": 0}, messages="none")
        given["teachers"] = [{**given["teachers"][0], "name": name, "model": name} for name in ("weak", "strong")]
        assert distill(tmp_path, **given) == 0
        assert len(server.requests) == 2 * 142
    out = {(int(id.partition(".")[2]), name): why for (id, name), why in rejected(tmp_path).items()}
    opens, disagree = ("refused", "opens with what an AI is"), ("unverified", "the teachers disagree")
    assert out == {
        (40, "weak"): opens,
        (146, "weak"): opens,
        (124, "strong"): opens,
        **{(id, name): disagree for id in (132, 144, 216) for name in ("weak", "strong")},
    }
    weak, strong = ledger(tmp_path)["teachers"]
    assert (weak["kept"], strong["kept"]) == (137, 138)
    # The scripted endpoint counts a token for four characters: the medians are those of the texts.
    for teacher, name, median in ((weak, "weak", 1218.5), (strong, "strong", 652)):
        lengths = sorted(len(each[name]) for each in replay)
        assert (lengths[70] + lengths[71]) / 2 == median
        assert abs(teacher["lengths"]["own"]["median"] - median / 4) < 1
    options = [{"options": found, "gold": "", "query": ""} for each in replay if (found := options_in(each["query"]))]
    assert len(options) == 11
    agreed = [
        (int(each["id"].partition(".")[2]), extracted(one, each["weak"]), extracted(one, each["strong"]))
        for each in replay
        if (one := {"options": options_in(each["query"]), "gold": ""})["options"]
    ]
    assert [id for id, a, b in agreed if a == b] == [14, 22, 26, 40, 88, 110, 240]
    assert [id for id, a, b in agreed if None not in (a, b) and a != b] == [132, 144, 216]


@real
@pytest.mark.slow
def test_real_queries_from_a_teacher_that_fails_on_purpose_to_what_a_trainer_reads(tmp_path):
    """429, 500, a prompt that is never taken, odd bodies, cut and empty answers, refusals: the ledger adds up to the query."""
    from fastft.config import read_config
    from fastft.data.conversation import read_conversations

    (tmp_path / "queries.jsonl.gz").write_bytes((DATA / "queries.jsonl.gz").read_bytes())
    with gzip.open(DATA / "queries.jsonl.gz") as file:
        golds = {each["query"]: each["gold"] for each in map(json.loads, file)}

    def reply(body, number):
        asked = body["messages"][-1]["content"]
        kind = sum(asked.encode()) % 12  # of the query alone, so that both teachers and all tries meet the same
        if number % 29 == 7:
            return openai_server.Failure(429, retry_after="0.05")
        if number % 31 == 5:
            return openai_server.Failure(500)
        if kind == 0:
            return openai_server.Failure(400, "this prompt is never taken")
        if kind == 1:
            return b'{"choices": "none"}' if seen.setdefault((asked, body["model"]), number) == number else golds[asked]
        if kind == 2:
            return openai_server.completion("Well, it is", body, "length")
        if kind == 3:
            return openai_server.completion(None, body, refusal="I'd rather not.")
        return "" if kind == 4 else f"It follows from what is said.\nThe answer is {golds[asked]}."

    seen: dict = {}
    with openai_server.endpoint(reply) as server:
        sample = {"cot": {"total": 60}, "niv2": {"per_task": 1, "total": 60}, "flan2021": {"total": 40}}
        given = settings(
            tmp_path, server.url, messages="orca", sample=sample, queries=str(tmp_path / "queries.jsonl.gz")
        )
        given |= {
            "verify": {"near": 0},
            "student": {"model": "m"},
            "teachers": [{**given["teachers"][0], "retries": 9}],
        }
        given["teachers"].append({**given["teachers"][0], "name": "second", "model": "big", "share": 0.25})
        assert distill(tmp_path, **given) == 0
    plan = rows(tmp_path / "run/plan.jsonl")
    expected = {0: "failed", 2: "cut", 3: "refused", 4: "cut"}
    for teacher, count in (("first", 160), ("second", 40)):
        ended = {id: why for (id, name), (why, _) in rejected(tmp_path).items() if name == teacher}
        asked = [row for row in plan if teacher in row["teachers"]]
        assert len(asked) == count
        for row in asked:
            assert ended.get(row["id"], "kept") == expected.get(sum(row["query"].encode()) % 12, "kept"), row["id"]
    train = read_config(tmp_path / "run/train.yaml")
    for stage, each in zip(train.stages, ledger(tmp_path)["teachers"], strict=True):
        conversations = list(read_conversations(stage.data))
        assert len(conversations) == each["kept"] > 10 and all(one.messages[-1].train for one in conversations)
