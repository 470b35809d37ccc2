"""From a task to figures over real HTTP: what is chosen, what is read when, what is paid, and what is left after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers import openai_server
from helpers.grimoires import RULE, is_for_strong, rows, scripted, write_rows, write_task
from helpers.openai_server import Failure

from fastft import cli
from fastft.compose.grimoire.writing.embed import embedder
from fastft.compose.grimoire.writing.write import load_grimoires
from fastft.errors import UserError
from fastft.inference.client import Client

SAMPLERS = ["--samplers", "random,hard,none"]


def command(server, path: Path, output: Path, *more: str) -> list[str]:
    models = ["--weak", f"{server.url}#weak", "--strong", f"{server.url}#strong"]
    return ["grimoire", "build", str(path), *models, *SAMPLERS, "-o", str(output), *more]


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A build and an evaluation: the directory, the task's file, and the endpoint's requests in order."""
    directory = tmp_path_factory.mktemp("grimoire")
    path, output = write_task(directory), directory / "made"
    with openai_server.endpoint(scripted) as server:
        assert cli.main(command(server, path, output)) == 0
        built = len(server.requests)
        assert cli.main(["grimoire", "evaluate", str(output)]) == 0
        yield output, path, server, built


def test_the_grimoire_that_holds_the_rule_is_chosen(made):
    output, _, _, _ = made
    choice = read(output / "choice.json")
    assert choice["chosen"] == "none-profound"
    assert RULE in (output / "prompt.txt").read_text()
    evaluation = read(output / "evaluation.json")
    gains = {row["setting"]: row for row in evaluation["gains"]}
    assert gains["none-profound"]["accuracy"]["value"] == 1.0
    assert gains["none-profound"]["gain"]["low"] > 0 and gains["none-profound"]["p_value"] < 0.01
    assert gains["none-simple"]["gain"]["value"] == 0.0
    assert gains["zero-shot"]["valid"] == 1.0 and gains["zero-shot"]["failed"] == 0
    assert "none-profound (chosen)" in (output / "grimoire.md").read_text()


def test_hard_samples_are_what_the_weak_model_got_wrong(made):
    output, _, _, _ = made
    rows_of = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    samples = {row["sampler"]: row["samples"] for row in rows_of}
    odd = {row["id"] for row in rows(30) if row["label"] == "odd"}
    assert sum(each in odd for each in samples["hard"]) == 4  # the weak model always says even
    assert samples["none"] == []


def test_every_question_is_asked_once_and_a_second_start_asks_nothing(made):
    output, path, server, built = made
    asked = Counter(json.dumps(body, sort_keys=True) for body in server.requests)
    assert max(asked.values()) == 1
    before = len(server.requests)
    assert cli.main(command(server, path, output)) == 0
    assert cli.main(["grimoire", "evaluate", str(output)]) == 0
    assert len(server.requests) == before
    test_texts = {row["text"] for row in rows(20, 2000)}
    assert not any(body["messages"][-1]["content"] in test_texts for body in server.requests[:built])


def test_another_seed_needs_another_directory(made, capsys):
    output, path, server, _ = made
    assert cli.main(command(server, path, output, "--seed", "23")) == 1
    assert "was made with seed 22, and now it is 23" in capsys.readouterr().err


def test_the_test_split_is_not_looked_at_twice(made, capsys, tmp_path):
    output, _, _, _ = made
    content = (output / "choice.json").read_text()
    try:
        (output / "choice.json").write_text(content.replace('"chosen": "none-profound"', '"chosen": "zero-shot"'))
        for _ in range(2):
            assert cli.main(["grimoire", "evaluate", str(output)]) == 1
            assert "read for another choice" in capsys.readouterr().err
            if (output / "evaluation.json").is_file():
                (output / "evaluation.json").rename(tmp_path / "kept")  # as if the first look had been killed
    finally:
        (tmp_path / "kept").rename(output / "evaluation.json")
        (output / "choice.json").write_text(content)
    assert cli.main(["grimoire", "evaluate", str(tmp_path)]) == 1
    assert "choose first" in capsys.readouterr().err


WATCHED = """
import sys
test, choice = sys.argv[1:3]
def watch(event, arguments):
    if event == "open" and str(arguments[0]).endswith(test):
        import os
        print("read", "after" if os.path.exists(choice) else "BEFORE", flush=True)
sys.addaudithook(watch)
from fastft import cli
code = cli.main(sys.argv[3:])
print("code", code, flush=True)
"""


def watched(test: str, choice: Path, arguments: list[str]) -> set[str]:
    """Run a verb in a process that reports every opening of the test split. Returns the distinct reports and the exit code."""
    line = [sys.executable, "-c", WATCHED, test, str(choice), *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    return {each for each in done.stdout.splitlines() if each.startswith(("read ", "code "))}


@pytest.mark.slow
def test_no_test_question_is_read_before_the_choice(tmp_path):
    """A hook of the interpreter sees every file that is opened, by whichever library."""
    path, output = write_task(tmp_path), tmp_path / "made"
    choice, evaluate = output / "choice.json", ["grimoire", "evaluate", str(output)]
    with openai_server.endpoint(scripted) as server:
        assert watched("test.jsonl", choice, command(server, path, output)) == {"code 0"}
        assert watched("test.jsonl", choice, evaluate) == {"read after", "code 0"}
        assert watched("test.jsonl", choice, evaluate) == {"code 0"}  # the figures are kept


@pytest.mark.slow
def test_kill_9_anywhere_pays_nothing_twice_and_the_budget_holds(tmp_path):
    """Killed after 5, 25, 60 and 130 replies. A reply that was on its way at a kill may be paid again, and is booked."""
    path, output = write_task(tmp_path), tmp_path / "made"
    prices = ["--usd_per_million", "1000,1000", "--concurrency", "2", "--max_usd"]
    with openai_server.endpoint(scripted) as server:
        for enough in (5, 25, 60, 130):
            line = [sys.executable, "-m", "fastft", *command(server, path, output, *prices, "100")]
            process = subprocess.Popen(
                line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            while len(server.requests) < enough and process.poll() is None:
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert cli.main(command(server, path, output, *prices, "100")) == 0
        asked = Counter(json.dumps(body, sort_keys=True) for body in server.requests)
        assert sum(asked.values()) - len(asked) <= 4 * 2  # those that were on their way at the four kills
        booked = sum(
            row.get("reserved", 0) + row.get("spent", 0)
            for row in map(json.loads, filter(str.strip, (output / "spent.jsonl").read_text().splitlines()))
        )
        paid = sum(cost(body) for body in server.requests)
        assert booked >= paid - 1e-9
        assert read(output / "choice.json")["chosen"] == "none-profound"


def cost(body: dict) -> float:
    """What the scripted endpoint says that a reply costs, at 1000 dollars for a million tokens."""
    usage = json.loads(openai_server.completion(scripted(body), body))["usage"]
    return usage["total_tokens"] / 1000


def test_the_budget_holds_over_several_starts(tmp_path, capsys):
    path, output = write_task(tmp_path), tmp_path / "made"
    more = ["--usd_per_million", "1000,1000", "--concurrency", "4", "--max_usd", "5"]
    with openai_server.endpoint(scripted) as server:
        for _ in range(3):
            assert cli.main(command(server, path, output, *more)) == 1
            assert "stopped before $5.00 would be exceeded" in capsys.readouterr().err
            assert sum(map(cost, server.requests)) <= 5
        assert sum(map(cost, server.requests)) > 1


def test_a_task_that_could_not_work_leaves_nothing_and_a_changed_one_is_named(tmp_path, capsys):
    path, output = write_task(tmp_path), tmp_path / "made"
    with openai_server.endpoint(scripted) as server:
        write_rows(tmp_path / "train.jsonl", [{"text": "2", "label": "evne"}])
        assert cli.main(command(server, path, output)) == 1 and not output.exists()
        write_task(tmp_path)  # mended: the same -o may be used
        prices = ["--usd_per_million", "1000,1000", "--max_usd", "0.0001"]
        assert cli.main(command(server, path, output, *prices)) == 1 and (output / "splits").is_dir()
        write_task(tmp_path, (29, 24, 20))
        for more in ([], ["--dry_run"]):
            assert cli.main(command(server, path, output, *more)) == 1
            assert (
                "the questions of the task have changed since it was made; give another -o" in capsys.readouterr().err
            )
        assert not server.requests


def test_what_is_made_is_what_a_dry_run_counts(made, tmp_path, capsys):
    """With a choice nothing is left to ask; with grimoires written by hand their number and their length count."""
    output, path, server, _ = made
    assert cli.main(command(server, path, output, "--dry_run")) == 0
    assert "nothing is asked, and nothing is paid" in capsys.readouterr().out
    (tmp_path / "own").mkdir()
    own = [{"name": f"own-{n}", "sampler": "none", "kind": "profound", "text": "Mind the end."} for n in range(3)]
    write_rows(tmp_path / "own/grimoires.jsonl", own)
    assert cli.main(command(server, path, tmp_path / "own", "--dry_run")) == 0
    said = capsys.readouterr().out
    assert "strong model: 0 calls" in said and f"weak model: {5 * 24} answers at most" in said


@pytest.mark.slow
def test_a_strong_model_that_failed_once_is_asked_again(tmp_path, caplog):
    down = True

    def reply(body, number):
        return Failure(400, "try later") if is_for_strong(body) and down else scripted(body)

    path, output = write_task(tmp_path, (8, 6, 4)), tmp_path / "made"
    with openai_server.endpoint(reply) as server:
        line = command(server, path, output)
        line[line.index("--samplers") + 1] = "none"
        assert cli.main(line) == 1
        down = False
        assert cli.main(line) == 0
    assert read(output / "choice.json")["settings"][2]["name"] == "none-profound"


@pytest.mark.slow
def test_a_setting_without_an_answer_is_shown_as_such(tmp_path):
    """The endpoint refuses everything that is longer than a few words: zero-shot alone is measured. The files are JSON."""

    def reply(body, number):
        long = not is_for_strong(body) and RULE in body["messages"][0]["content"]
        return Failure(400, "context_length_exceeded") if long else scripted(body)

    path, output = write_task(tmp_path, (8, 6, 4)), tmp_path / "made"
    with openai_server.endpoint(reply) as server:
        line = command(server, path, output)
        line[line.index("--samplers") + 1] = "none"
        assert cli.main(line) == 0
        assert cli.main(["grimoire", "evaluate", str(output)]) == 0
    for name in ("choice.json", "evaluation.json"):
        assert "NaN" not in (output / name).read_text()
    choice = read(output / "choice.json")
    assert choice["chosen"] == "zero-shot" and "nan" not in choice["why"]
    assert "nan" not in (output / "grimoire.md").read_text() and "nan" not in (output / "grimoire.html").read_text()


@pytest.mark.slow
def test_a_dry_run_says_the_calls_and_the_cost_and_asks_nothing(tmp_path, capsys):
    path, output = write_task(tmp_path), tmp_path / "made"
    with openai_server.endpoint(scripted) as server:
        assert cli.main(command(server, path, output, "--dry_run", "--usd_per_million", "1000,1000")) == 0
        assert not server.requests and not output.exists()
        said = capsys.readouterr().out
        assert "strong model: 6 calls" in said and "weak model: 222 answers at most" in said  # 8 settings x 24 + 30
        most = float(said.partition("at most $")[2].split()[0])
        assert cli.main(command(server, path, output, "--usd_per_million", "1000,1000")) == 0
        assert sum(map(cost, server.requests)) <= most


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the strong model wrote nothing"),
        ("I'm sorry, but I can't help with that.", "the strong model refuses"),
        ("word " * 600, "it has 600 words, and 400 were asked for"),
    ],
)
def test_a_strong_model_that_writes_nothing_usable_ends_the_run_in_one_line(tmp_path, capsys, caplog, text, said):
    def reply(body, number):
        return text if is_for_strong(body) else scripted(body)

    path = write_task(tmp_path)
    with openai_server.endpoint(reply) as server:
        assert cli.main(command(server, path, tmp_path / "made")) == 1
        assert sum(map(is_for_strong, server.requests)) == 3 * 3  # each profound one three times
    assert said in caplog.text
    [line] = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    assert "no grimoire can be used" in line and said in line


@pytest.mark.slow
def test_a_grimoire_that_quotes_is_asked_for_again(tmp_path):
    quote = rows(1)[0]["text"]

    def reply(body, number):
        again = sum(map(is_for_strong, server.requests)) > 3
        return f"Such as: {quote}. {'Fine' if again else ''}" if is_for_strong(body) and not again else scripted(body)

    path, output = write_task(tmp_path), tmp_path / "made"
    with openai_server.endpoint(reply) as server:
        assert cli.main(command(server, path, output, "--no_copies", "--concurrency", "1")) == 0
    written = [json.loads(line) for line in (output / "grimoires.jsonl").read_text().splitlines()]
    assert not any(row["copies"] or row["wrong"] for row in written)


@pytest.mark.slow
def test_an_edited_grimoire_that_is_empty_is_left_out(tmp_path, caplog):
    path, output = write_task(tmp_path), tmp_path / "made"
    with openai_server.endpoint(scripted) as server:
        arguments = command(server, path, output)
        output.mkdir()
        kept = {"name": "mine", "sampler": "none", "kind": "profound", "text": f"Remember: {RULE}."}
        write_rows(output / "grimoires.jsonl", [kept, {**kept, "name": "blank", "text": " "}])
        assert cli.main(arguments) == 0
        assert not any(map(is_for_strong, server.requests))
        assert "blank is left out: it is empty" in caplog.text
        assert read(output / "choice.json")["chosen"] == "mine"
        assert cli.main(["grimoire", "evaluate", str(output), "--max_test", "3"]) == 0
    assert "blank is left out: it is empty" in (output / "grimoire.html").read_text()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"text": None}, "its text is not a text"),
        ({"name": 7}, "its name is not a text"),
        ({"name": "zero-shot"}, "another setting is called 'zero-shot'"),
        ({"kind": ...}, "it needs name, sampler, kind and text"),
    ],
)
def test_a_grimoire_that_was_edited_into_something_else_is_named_by_its_line(tmp_path, changed, said):
    row = {"name": "mine", "sampler": "none", "kind": "profound", "text": "Mind it.\u2028Really.", **changed}
    write_rows(tmp_path / "g.jsonl", [{key: value for key, value in row.items() if value is not ...}])
    with pytest.raises(UserError, match=f"line 1: .*{said}"):
        load_grimoires(tmp_path / "g.jsonl")


@pytest.mark.slow
def test_answers_in_another_language_are_said_in_a_line(tmp_path, caplog):
    def reply(body, number):
        return scripted(body) if is_for_strong(body) else "gerade"

    with openai_server.endpoint(reply) as server:
        assert cli.main(command(server, write_task(tmp_path), tmp_path / "made")) == 0
    assert "answers name no label, such as 'gerade'" in caplog.text
    assert read(tmp_path / "made/choice.json")["chosen"] == "zero-shot"


@pytest.mark.slow
def test_an_endpoint_without_constrained_choice_is_read_by_its_text(tmp_path):
    def reply(body, number):
        if "response_format" in body:
            return Failure(400, "response_format is not supported")
        return scripted(body)

    with openai_server.endpoint(reply) as server:
        assert cli.main(command(server, write_task(tmp_path), tmp_path / "made")) == 0
    answers = [json.loads(line) for line in (tmp_path / "made/runs.jsonl").read_text().splitlines()]
    assert {row["how"] for row in answers} == {"text"}
    assert read(tmp_path / "made/choice.json")["chosen"] == "none-profound"


@pytest.mark.slow
def test_failed_calls_are_counted_apart(tmp_path, capsys):
    def reply(body, number):
        poisoned = body["messages"][-1]["content"] == "Box: 15"
        return Failure(400, "this prompt is flagged") if poisoned and not is_for_strong(body) else scripted(body)

    path, output = write_task(tmp_path), tmp_path / "made"
    write_rows(tmp_path / "validation.jsonl", [*rows(24, 1000), {"text": "Box: 15", "label": "odd"}])
    with openai_server.endpoint(reply) as server:
        assert cli.main(command(server, path, output)) == 0
    gains = {row["setting"]: row for row in read(output / "choice.json")["gains"]}
    assert {row["failed"] for name, row in gains.items() if name not in ("similar", "ranked")} == {1}
    assert {row["questions"] for row in gains.values()} == {24}


@pytest.mark.slow
def test_a_directory_is_asked_for_likelihoods(tmp_path, model):
    """A tiny random model: what it chooses means nothing, but every answer is a label with scores of all labels."""
    path, output = write_task(tmp_path, (12, 6, 5)), tmp_path / "made"
    with openai_server.endpoint(scripted) as server:
        arguments = command(server, path, output, "--calibrate")
        arguments[arguments.index("--weak") + 1] = str(model)
        assert cli.main(arguments) == 0
        assert all(map(is_for_strong, server.requests))
    assert cli.main(["grimoire", "evaluate", str(output), "--max_test", "4"]) == 0
    answers = [json.loads(line) for line in (output / "test_runs.jsonl").read_text().splitlines()]
    assert len({(row["prompt"], row["id"]) for row in answers}) == len(answers) == 4 * 5  # distinct prompts
    assert all(row["how"] == "likelihood" and set(row["scores"]) == {"even", "odd"} for row in answers)
    assert all(0 < row["valid"] < 1 and row["answer"] in ("even", "odd") for row in answers)
    evaluation = read(output / "evaluation.json")
    assert evaluation["questions"] == 4 and len(evaluation["gains"]) == 10


@pytest.mark.slow
def test_a_text_longer_than_the_context_of_a_directory_is_a_failed_call(tmp_path, model):
    path, output = write_task(tmp_path, (8, 3, 3)), tmp_path / "made"
    write_rows(tmp_path / "validation.jsonl", [*rows(3, 1000), {"text": "word " * 20_000, "label": "odd"}])
    for how in ("likelihood", "text"):
        with openai_server.endpoint(scripted) as server:
            arguments = command(server, path, output / how, "--answers", how)
            arguments[arguments.index("--weak") + 1] = str(model)
            arguments[arguments.index("--samplers") + 1] = "none"
            assert cli.main(arguments) == 0
        gains = {row["setting"]: row for row in read(output / how / "choice.json")["gains"]}
        assert gains["zero-shot"]["failed"] == 1 and gains["zero-shot"]["questions"] == 3


@pytest.mark.slow
def test_a_directory_can_be_asked_for_texts(tmp_path, model):
    path, output = write_task(tmp_path, (8, 3, 3)), tmp_path / "made"
    with openai_server.endpoint(scripted) as server:
        arguments = command(server, path, output, "--answers", "text")
        arguments[arguments.index("--weak") + 1] = str(model)
        arguments[arguments.index("--samplers") + 1] = "none"
        assert cli.main(arguments) == 0
    answers = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    assert {row["how"] for row in answers} == {"text"} and all(row["valid"] in (0, 1) for row in answers)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--weak", "nowhere"], "must be a model's directory, or URL#name"),
        (["--strong", "gpt-4"], "must be URL#name of an endpoint"),
        (["--answers", "likelihood"], "needs a model's directory"),
        (["--samplers", "best"], "--samplers best: there are kmeans"),
        (["--count", "0"], "--count must be at least 1"),
        (["--prompts", "."], "holds none of profound.txt"),
        (["--encoder", "nowhere"], "--encoder nowhere: must be tfidf"),
        (["--max_usd", "1"], "needs --usd_per_million"),
    ],
)
def test_a_wrong_option_ends_in_one_line(tmp_path, capsys, options, said):
    with openai_server.endpoint(scripted) as server:
        code = cli.main([*command(server, write_task(tmp_path), tmp_path / "made"), *options])
    assert code in (1, 2)
    [line] = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    assert said in line


@pytest.mark.slow
def test_questions_can_be_embedded_by_an_endpoint_which_is_asked_once(tmp_path):
    """The embeddings of a text are its numbers of some letters; the second start has them all."""

    def reply(body, number):
        if "input" not in body:
            return scripted(body)
        data = [
            {"index": place, "embedding": [1.0 + text.count(letter) for letter in "aeiou"]}
            for place, text in enumerate(body["input"])
        ]
        return json.dumps({"data": data[::-1]}).encode()

    path, output = write_task(tmp_path), tmp_path / "made"
    with openai_server.endpoint(reply) as server:
        line = command(server, path, output, "--encoder", f"{server.url}#embeddings")
        line[line.index("--samplers") + 1] = "kmeans,hierarchical"
        assert cli.main(line) == 0
        asked = [text for body in server.requests for text in body.get("input", [])]
        assert len(asked) == len(set(asked)) > 50
        before = len(server.requests)
        assert cli.main(["grimoire", "evaluate", str(output)]) == 0
        assert sum(len(body.get("input", [])) for body in server.requests[before:]) == 20  # the test questions


def test_an_endpoint_without_embeddings_ends_the_run_in_one_line(tmp_path, capsys):
    def reply(body, number):
        return Failure(404, "no such route") if "input" in body else scripted(body)

    with openai_server.endpoint(reply) as server:
        line = command(server, write_task(tmp_path), tmp_path / "made", "--encoder", f"{server.url}#embeddings")
        line[line.index("--samplers") + 1] = "kmeans"
        assert cli.main(line) == 1
    assert "gives no embeddings" in capsys.readouterr().err


def test_a_row_of_embeddings_that_a_kill_has_cut_is_asked_for_once_more_only(tmp_path):
    with openai_server.endpoint(lambda body, number: b'{"data": [{"index": 0, "embedding": [3, 4]}]}') as server:
        address, cache = f"{server.url}#embeddings", tmp_path / "rows.jsonl"
        embed = embedder(address, [], cache, Client(address))
        embed(["one"])
        cache.write_bytes(cache.read_bytes()[:-5])
        for _ in range(2):
            assert embed(["one"])[0] == pytest.approx([0.6, 0.8])
        assert len(server.requests) == 2


def test_answers_become_training_data_without_the_grimoire(made, tmp_path):
    output, _, _, _ = made
    write_rows(tmp_path / "new.jsonl", [{"id": f"n{n}", "text": f"Something new: {n}"} for n in range(6)])
    texts = str(tmp_path / "new.jsonl")
    answers, chats = tmp_path / "answers.jsonl", tmp_path / "chats.jsonl"
    assert cli.main(["grimoire", "apply", str(output), texts, "-o", str(answers)]) == 0
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["answer"] for row in found] == ["even", "odd"] * 3 and found[0]["setting"] == "none-profound"
    assert cli.main(["grimoire", "apply", str(output), texts, "-o", str(chats), "--as", "conversations"]) == 0
    from fastft.data.conversation import read_conversations

    conversations = list(read_conversations(chats))
    assert [each.messages[-1].content for each in conversations] == ["even", "odd"] * 3
    assert [each.messages[-1].train for each in conversations] == [True] * 6
    assert RULE not in chats.read_text()


def test_the_gateway_puts_the_chosen_instructions_before_a_conversation(made):
    from fastft.compose.grimoire.policy import GrimoirePolicy
    from fastft.data.conversation import Conversation, Message

    output, _, _, _ = made
    policy = GrimoirePolicy("parity", output, "small")
    asked = Conversation("c", [Message("user", "Is 7 odd?")])
    choice = policy.choose(asked, 1, ["small", "large"])
    assert choice.model == "small" and choice.why == "grimoire none-profound"
    assert choice.probabilities == {"small": 1.0, "large": 0.0} and policy.models == ["small"]
    question = {"role": "user", "content": [{"type": "text", "text": "Is 7 odd?"}]}
    told = policy.instructed([question])
    assert RULE in told[0]["content"] and told[1:] == [question]
    own = policy.instructed([{"role": "developer", "content": "Be brief."}, question])
    assert own[0]["content"].endswith("Be brief.") and RULE in own[0]["content"] and own[1:] == [question]


def test_a_policy_that_chooses_for_each_question_answers_the_same_one_alike(made, tmp_path):
    import shutil

    from fastft.compose.grimoire.policy import GrimoirePolicy
    from fastft.data.conversation import Message

    output, _, _, _ = made
    for name in ("similar", "ranked"):
        copy = tmp_path / name
        shutil.copytree(output, copy)
        choice = read(copy / "choice.json")
        (copy / "choice.json").write_text(json.dumps({**choice, "chosen": name}))
        policies = [GrimoirePolicy("parity", copy, "small") for _ in range(2)]
        asked = [[Message("user", row["text"])] for row in rows(5)]
        names = [[policy.setting_for(each).name for each in asked] for policy in policies]
        assert names[0] == names[1] and "zero-shot" not in names[0]


def test_the_page_escapes_what_models_wrote(made, tmp_path):
    from fastft.compose.grimoire.page import write_results

    output, _, _, _ = made
    choice, evaluation = read(output / "choice.json"), read(output / "evaluation.json")
    choice["settings"][2]["text"] = "<script>alert(1)</script>"
    write_results(tmp_path, choice, evaluation)
    page = (tmp_path / "grimoire.html").read_text()
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page
