"""The client over real HTTP: a reply of any shape belongs to its request, and limits hold whatever the endpoint does."""

import json
import threading
import time

import pytest
from helpers import openai_server
from helpers.judging import error_of, judged, longer_wins, run_answer, run_judge, write_ground
from helpers.openai_server import Failure, completion

from fastft.inference.completion import ErrorInBody, Malformed, read_completion
from fastft.inference.endpoint import EndpointConfig, Limits
from fastft.judge.questions import read_answers


def thought(body: dict) -> list:
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "1 10?"}]}
    half = len(text := longer_wins(body)) // 2
    return [thinking, {"type": "text", "text": text[:half]}, {"type": "text", "text": text[half:]}]


SHAPES = {
    "lone surrogate": lambda body: completion(longer_wins(body)[:-1] + ', "math": "\ud835"}', body),
    "not UTF-8": lambda body: completion(longer_wins(body)[:-1] + ', "math": "MATH"}', body).replace(
        b"MATH", b"\xed\xa0\xff"
    ),
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
    assert ("\ufffd" in judged(tmp_path)[0].text) == (shape in ("lone surrogate", "not UTF-8"))


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
def test_what_is_no_completion_is_refused_with_the_reason(body, error):
    with pytest.raises((Malformed, ErrorInBody), match=error):
        read_completion(body)


def test_an_error_with_status_200_is_tried_again(tmp_path, capsys):
    """Gateways send such errors; they name no time to wait and are not billed."""
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
    """A server may not know max_completion_tokens; a reply would then have no limit, and neither would its cost."""
    reply = lambda body, number: Failure(400, said) if number == 0 else longer_wins(body)  # noqa: E731
    with openai_server.endpoint(reply) as server:
        ground = [*write_ground(tmp_path, 3), "--judge", f"{server.url}#judge", "--concurrency", "1"]
        assert said[:40] in error_of(capsys, ground)
        assert all(request["max_tokens"] == 1024 for request in server.requests)
        assert all("temperature" in request and "response_format" in request for request in server.requests)


def test_limits_hold_for_retries(tmp_path):
    """120 requests a minute: 0.5 s from each to the next, those tried again with them."""
    ground, times = write_ground(tmp_path, 3), []

    def reply(body, number):
        times.append(time.monotonic())
        return Failure(503) if number < 3 else longer_wins(body)

    with openai_server.endpoint(reply) as server:
        assert run_judge([*ground, "--judge", f"{server.url}#judge", "--rpm", "120"]) == 0
    assert len(times) == 3 + 6
    assert times[-1] - times[0] > 3, "4 s; it would be 2.5 s if only first tries waited for their turn"


def test_a_429_holds_back_every_request(tmp_path):
    """Four are in flight when the first is told to wait; no request begins in that time, whatever the others get."""
    ground, times, said, together = write_ground(tmp_path, 10), [], [], threading.Barrier(4)

    def reply(body, number):
        times.append(time.monotonic())
        if number < 4:
            together.wait(30)
        if number == 0:
            said.append(time.monotonic())
            return Failure(429, "slow down", retry_after="2")
        time.sleep(0.5 * (number < 4))
        return longer_wins(body)

    with openai_server.endpoint(reply) as server:
        assert run_judge([*ground, "--judge", f"{server.url}#judge", "--concurrency", "4"]) == 0
    assert len(times) == 21
    assert not [each for each in times if said[0] < each < said[0] + 2]


@pytest.mark.parametrize("concurrency, refused", [(1, 3), (16, 3 * 6)])
def test_an_endpoint_without_structured_output_and_with_other_names(tmp_path, concurrency, refused):
    """Requests in flight together are refused together, and each is sent again without what was refused."""
    ground = write_ground(tmp_path, 3)

    def reply(body, number):
        time.sleep(0.2 * (concurrency > 1))
        if "response_format" in body:
            return Failure(400, "Unknown parameter: 'response_format'.")
        if "max_tokens" in body:
            return Failure(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if "temperature" in body:
            return Failure(400, "Unsupported value: 'temperature' does not support 0.")
        scores = json.loads(longer_wins(body))
        return f"Both are fine.\n\nAssistant 1: {scores['score_1']}/10\nAssistant 2: {scores['score_2']}/10"

    with openai_server.endpoint(reply) as server:
        assert run_judge([*ground, "--judge", f"{server.url}#judge", "--concurrency", str(concurrency)]) == 0
        assert len(server.requests) == refused + 6, "each is refused once"
        assert server.requests[-1]["max_completion_tokens"] == 1024
    assert all(judgment.parsed for judgment in judged(tmp_path))


def test_an_endpoint_that_is_down_is_given_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(EndpointConfig, "limits", Limits(concurrency=4, retries=1))
    with openai_server.endpoint(lambda body, number: Failure(503)) as server:
        said = error_of(capsys, [*write_ground(tmp_path, 20), "--judge", f"{server.url}#judge"])
        assert "8 requests in a row failed for good" in said and len(server.requests) < 40
