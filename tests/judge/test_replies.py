"""Whatever an endpoint replies belongs to the request that it was a reply to; and a key belongs to one endpoint."""

import json

import pytest
from helpers import openai_server
from helpers.judging import SECRET, error_of, longer_wins, run_answer, run_judge, write_ground
from helpers.openai_server import Failure, completion

from fastft.inference.budget import Cache
from fastft.inference.completion import ErrorInBody, Malformed, read_completion
from fastft.inference.endpoint import KEY, EndpointConfig, Limits, key_for
from fastft.judge.judgment import read_judgments
from fastft.judge.questions import read_answers

OTHER = "sk-another-endpoints-key"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def judged(tmp_path) -> list:
    return read_judgments(tmp_path / "judged/judgments.jsonl")


def thought(body: dict) -> list:
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "1 10?"}]}
    half = len(text := longer_wins(body)) // 2
    return [thinking, {"type": "text", "text": text[:half]}, {"type": "text", "text": text[half:]}]


SHAPES = {
    "lone surrogate": lambda body: completion(longer_wins(body)[:-1] + ', "math": "\ud835"}', body),
    "list of parts": lambda body: completion(thought(body), body),
    "a choice without a reason": lambda body: completion(longer_wins(body), body, None),
    "reasoning beside": lambda body: completion(longer_wins(body), body, reasoning_content="1 10?"),
    "usage that counts nothing": lambda body: completion(longer_wins(body), body).replace(
        b'"usage": {', b'"usage": {"x": 1}, "y": {'
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_reply_of_any_shape_is_read_and_kept(tmp_path, shape):
    ground = write_ground(tmp_path, 4)
    with openai_server.endpoint(lambda body, number: SHAPES[shape](body)) as server:
        for _ in range(2):
            assert run_judge([*ground, "--judge", f"{server.url}#judge"]) == 0
            assert [judgment.winner for judgment in judged(tmp_path)] == ["b"] * 8
            assert len(server.requests) == 8, "the second run is paid by the first"
    assert ("\ufffd" in judged(tmp_path)[0].text) == (shape == "lone surrogate")


def test_a_cache_with_a_list_of_parts_is_read(tmp_path):
    """Earlier versions kept the endpoint's own words, whatever they were."""
    reply = {"finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1, "seconds": 0.1}
    rows = [
        {"key": key, "reply": {**reply, "text": text}}
        for key, text in (("list", [{"type": "text", "text": "8 9"}]), ("half", "\ud835"), ("number", 5))
    ]
    (tmp_path / "cache.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = Cache(tmp_path / "cache.jsonl")
    assert {key: reply.text for key, reply in cache.replies.items()} == {"list": "8 9", "half": "\ufffd"}


def test_half_characters_in_questions_and_answers_are_no_reason_to_stop(tmp_path):
    ground = write_ground(tmp_path, 3)
    for name in ("questions", "a"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(path.read_text().replace("What is 1", "What is \\ud835 1").replace("word ", "w\\udc00rd ", 1))
    with openai_server.endpoint(longer_wins) as server:
        assert run_judge([*ground, "--judge", f"{server.url}#judge"]) == 0
        assert run_judge([*ground, "--judge", f"{server.url}#judge"]) == 0
        assert len(server.requests) == 6
    assert "w\ufffdrd" in (tmp_path / "judged/answers.jsonl").read_text()
    with openai_server.endpoint(lambda body, number: completion("It is \ud835.", body)) as server:
        options = [ground[4], "--model", f"{server.url}#mine", "-o", str(tmp_path / "mine.jsonl")]
        assert run_answer(options) == 0
    assert {answer.turns for answer in read_answers(tmp_path / "mine.jsonl")} == {("It is \ufffd.",)}


@pytest.mark.parametrize(
    "body, error",
    [
        (b"<html>Welcome</html>", "not JSON but '<html>Welcome</html>'"),
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "no choice"),
        (b'{"choices": []}', "no choice"),
        (b'{"choices": null}', "no choice"),
        (b'{"choices": [{"message": "hi"}]}', "no choice"),
        (b'{"choices": [{"message": {"content": 5}}]}', "content is of type int"),
        (b'{"choices": null, "error": {"message": "busy", "code": 429}}', "429 - busy"),
        (b'{"error": "busy"}', "None - busy"),
        (b'{"choices": [{"finish_reason": "error", "error": {"message": "lost", "code": "502"}}]}', "502 - lost"),
    ],
)
def test_what_is_no_completion(body, error):
    with pytest.raises((Malformed, ErrorInBody), match=error):
        read_completion(body)


def test_an_error_with_status_200_is_tried_again(tmp_path, capsys):
    """As gateways send it; without a wait of its own, and unbilled."""
    busy = json.dumps({"choices": None, "error": {"message": "Provider returned error", "code": 429}}).encode()
    with openai_server.endpoint(lambda body, number: busy if number % 3 == 0 else longer_wins(body)) as server:
        price = ["--usd_per_million", "1000,1000", "--max_usd", "100"]
        assert run_judge([*write_ground(tmp_path, 3), "--judge", f"{server.url}#judge", *price]) == 0
    assert all(judgment.parsed for judgment in judged(tmp_path))
    paid = sum(judgment.usd for judgment in judged(tmp_path))
    assert f"spent ${paid:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "failure, said",
    [
        (Failure(429, "You exceeded your current quota", code="insufficient_quota"), "no money left"),
        (Failure(402, "Insufficient credits"), "no money left"),
        (b'{"error": {"code": 402, "message": "Insufficient credits"}}', "no money left"),
        (Failure(401, "no"), "wants a key"),
        (Failure(403, "Country not supported"), "wants a key"),
        (Failure(404, "no such model"), "has no judge"),
    ],
)
def test_what_holds_for_every_request_ends_the_run_at_once(tmp_path, capsys, failure, said):
    ground, broken = write_ground(tmp_path, 4), [True]
    reply = lambda body, number: failure if broken[0] and number >= 3 else longer_wins(body)  # noqa: E731
    with openai_server.endpoint(reply) as server:
        judge = ["--judge", f"{server.url}#judge", "--concurrency", "1"]
        error = error_of(capsys, [*ground, *judge])
        assert said in error and "5 of 8 are not judged" in error
        assert len(server.requests) == 4 and len(judged(tmp_path)) == 3, "and what was paid is written"
        broken[0] = False
        assert run_judge([*ground, *judge]) == 0 and server.paid == 8


@pytest.mark.parametrize(
    "failure",
    [
        Failure(400, "content policy"),
        Failure(403, "Your input was flagged by moderation"),
        Failure(413, "too large"),
        Failure(451, "no"),
        b'{"choices": []}',
        b'{"error": {"code": 400, "message": "no"}}',
    ],
)
def test_any_other_failure_is_one_requests(tmp_path, capsys, failure):
    ground = write_ground(tmp_path, 4)
    reply = lambda body, number: failure if "is 1?" in body["messages"][0]["content"] else longer_wins(body)  # noqa: E731
    with openai_server.endpoint(reply) as server:
        assert "2 of 8 are not judged" in error_of(capsys, [*ground, "--judge", f"{server.url}#judge"])
    assert [judgment.question_id for judgment in judged(tmp_path) if not judgment.parsed] == ["q1", "q1"]


def test_a_page_instead_of_an_endpoint_is_given_up(tmp_path, capsys):
    with openai_server.endpoint(lambda body, number: b"<html>Welcome to nginx</html>") as server:
        said = error_of(capsys, [*write_ground(tmp_path, 12), "--judge", f"{server.url}#judge", "--concurrency", "4"])
        assert "8 requests in a row failed for good" in said and "Welcome to nginx" in said and "/v1" in said
        assert len(server.requests) < 3 * 24


@pytest.mark.parametrize(
    "said",
    [
        "'max_tokens' or 'max_completion_tokens' is too large: 1024. This model's maximum context length is 2048 tokens",
        "Invalid request: temperature, max_tokens and messages given; context window of 1024 tokens exceeded",
        "max_tokens must be at most 512",
    ],
)
def test_a_prompt_that_is_too_long_changes_no_parameter(tmp_path, capsys, said):
    """A server may not know max_completion_tokens: a reply would then have no end, nor would its cost."""
    reply = lambda body, number: Failure(400, said) if number == 0 else longer_wins(body)  # noqa: E731
    with openai_server.endpoint(reply) as server:
        ground = [*write_ground(tmp_path, 3), "--judge", f"{server.url}#judge", "--concurrency", "1"]
        assert said[:40] in error_of(capsys, ground)
        assert all(request["max_tokens"] == 1024 for request in server.requests)
        assert all("temperature" in request and "response_format" in request for request in server.requests)


def test_a_judge_that_only_thinks(tmp_path, capsys):
    """Cut while it thinks, it would be cut again: asked once. Silent for another reason, it is asked once more."""
    ground = write_ground(tmp_path, 2)
    reply = lambda body, number: completion(None, body, "length", reasoning_content="Hm")  # noqa: E731
    with openai_server.endpoint(reply) as server:
        said = error_of(capsys, [*ground, "--judge", f"{server.url}#judge"])
        assert "none of 4 judgments could be read" in said and "larger --max_tokens" in said
        assert len(server.requests) == 4 and {judgment.flags for judgment in judged(tmp_path)} == {("cut", "empty")}
    reply = lambda body, number: completion(None, body) if number == 0 else longer_wins(body)  # noqa: E731
    with openai_server.endpoint(reply) as server:
        assert run_judge([*ground, "--judge", f"{server.url}#judge", "--concurrency", "1"]) == 0
        assert len(server.requests) == 5
        assert all(message["content"] for request in server.requests for message in request["messages"])


def test_nothing_that_can_be_read_is_a_failure(tmp_path, capsys):
    with openai_server.endpoint(lambda body, number: "Final verdict: [[A]]") as server:
        said = error_of(capsys, [*write_ground(tmp_path, 2), "--judge", f"{server.url}#judge"])
    assert "none of 4 judgments could be read (judge wrote 'Final verdict: [[A]]')" in said


# Keys ----------------------------------------------------------------------------------------------------------------------


def sent(server) -> set:
    return {headers.get("authorization") for headers in server.headers}


def test_openais_key_goes_nowhere_else(tmp_path, monkeypatch):
    for name, value in (
        ("OPENAI_ORG_ID", "org-1"),
        ("OPENAI_PROJECT_ID", "p-1"),
        ("OPENAI_CUSTOM_HEADERS", "X-Own: " + SECRET),
    ):
        monkeypatch.setenv(name, value)
    ground = write_ground(tmp_path, 2)
    with openai_server.endpoint(longer_wins) as one, openai_server.endpoint(longer_wins) as other:
        judges = ["--judge", f"{one.url}#j", "--judge", f"{other.url}#j"]
        assert run_judge([*ground, *judges]) == 0
        assert sent(one) == sent(other) == {None}
        assert SECRET not in str(one.headers + other.headers) and "org-1" not in str(one.headers)
        monkeypatch.setenv("OPENAI_BASE_URL", one.url)
        assert run_judge([*ground[:-1], str(tmp_path / "again"), *judges]) == 0
        assert sent(one) == {None, f"Bearer {SECRET}"} and sent(other) == {None}, "another port is another place"
    assert key_for("https://api.openai.com/v1") == key_for("https://api.openai.com:443/v1") == SECRET
    for url in ("http://api.openai.com/v1", "https://api.openai.com.example.org/v1", "https://api.openai.com:8443/v1"):
        assert key_for(url) == "", url


def test_a_key_for_each_endpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OTHER_KEY", OTHER)
    ground = write_ground(tmp_path, 2)
    with openai_server.endpoint(longer_wins) as one, openai_server.endpoint(longer_wins) as other:
        judges = ["--judge", f"{one.url}#j", "--judge", f"{other.url}#j"]
        assert "once for each endpoint" in error_of(capsys, [*ground, *judges, "--judge_key_env", "OTHER_KEY"])
        assert "NO_KEY is not set" in error_of(capsys, [*ground, *judges[:2], "--judge_key_env", "NO_KEY"])
        assert "name of the environment variable" in error_of(capsys, [*ground, *judges[:2], "--judge_key_env", SECRET])
        assert not one.requests
        assert run_judge([*ground, *judges, "--judge_key_env", "OTHER_KEY", "--judge_key_env", ""]) == 0
        assert sent(one) == {f"Bearer {OTHER}"} and sent(other) == {None}
        options = [ground[4], "--model", f"{other.url}#mine", "-o", str(tmp_path / "mine.jsonl")]
        with openai_server.endpoint(lambda body, number: "Fine.") as third:
            options[2] = f"{third.url}#mine"
            assert run_answer([*options, "--model_key_env", "OTHER_KEY"]) == 0
            assert sent(third) == {f"Bearer {OTHER}"}
        judges[3] = f"{one.url}#two"
        assert run_judge([*ground[:-1], str(tmp_path / "both"), *judges, "--judge_key_env", "OTHER_KEY"]) == 0
        assert sent(one) == {f"Bearer {OTHER}"}, "two models of one host need one key"
    for path in [*tmp_path.rglob("*.json*"), *tmp_path.rglob("*.html")]:
        assert OTHER not in path.read_text() and SECRET not in path.read_text(), path


def test_a_redirect_to_another_host_takes_no_key_along(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"X-Own: {OTHER}\nauthorization: Bearer {OTHER}")
    monkeypatch.setattr(EndpointConfig, "limits", Limits(retries=0))
    with openai_server.endpoint(longer_wins) as elsewhere:
        away = Failure(307, location=f"{elsewhere.url}/chat/completions")
        with openai_server.endpoint(lambda body, number: away) as server:
            judge = ["--judge", f"{server.url}#j", "--judge_key_env", KEY]
            assert run_judge([*write_ground(tmp_path, 2), *judge]) == 0
            assert sent(server) == {f"Bearer {SECRET}"} and len(elsewhere.requests) == 4
            assert "org-1" not in str(server.headers) and OTHER not in str(server.headers), "those are OpenAI's"
    assert sent(elsewhere) == {None} and SECRET not in str(elsewhere.headers)
