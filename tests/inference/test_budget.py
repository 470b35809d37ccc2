"""Money and the cache: no limit is exceeded, whatever prompts cost, and no reply is paid for twice."""

import json
import re

import pytest
from helpers import openai_server
from helpers.judging import error_of, longer_wins, run_judge, write_ground
from helpers.openai_server import Failure

from fastft.errors import UserError
from fastft.inference.budget import FREE, Cache, read_prices
from fastft.inference.completion import Reply

REPLY = Reply("8 9", "stop", 1, 1, 0.1)


def test_money_is_not_overspent(tmp_path, capsys):
    ground = write_ground(tmp_path)
    with openai_server.endpoint(longer_wins) as server:
        price = ["--judge", f"{server.url}#judge", "--usd_per_million", "100,100", "--max_tokens", "100"]
        assert run_judge([*ground, *price, "--dry_run"]) == 0
        assert not server.requests and not (tmp_path / "judged").exists()
        assert re.search(r"20 calls: about [\d,]+ prompt and 4,000 reply tokens, \$\d\.\d\d", capsys.readouterr().err)
        assert run_judge([*ground, *price, "--max_usd", "0.3"]) == 1
        said = capsys.readouterr()
        assert "stopped before $0.30" in said.err
        assert 0 < spent_in(said.out) <= 0.3 and server.paid < 20
        assert run_judge([*ground, *price, "--max_usd", "9"]) == 0
        assert server.paid == 20
        capsys.readouterr()
        assert run_judge([*ground, *price, "--dry_run"]) == 0
        assert "0 calls: about 0 prompt and 0 reply tokens, $0.00; 20 more are cached" in capsys.readouterr().err
    assert "--max_usd needs" in error_of(capsys, [*ground, "--judge", "http://x/v1#j", "--max_usd", "1"])


def spent_in(said: str) -> float:
    return float(re.search(r"spent \$([\d.]+)", said)[1])


def test_money_holds_where_a_prompt_has_more_tokens_than_was_thought(tmp_path, capsys):
    """Chinese, code and digits have two tokens where English has one; 16 requests are in flight at the limit."""
    ground = write_ground(tmp_path)

    def reply(body, number):
        completion = json.loads(openai_server.completion(longer_wins(body), body))
        completion["usage"]["prompt_tokens"] = len(body["messages"][0]["content"].encode()) // 2
        return json.dumps(completion).encode()

    with openai_server.endpoint(reply) as server:
        price = ["--judge", f"{server.url}#judge", "--usd_per_million", "100,100", "--max_tokens", "50"]
        assert run_judge([*ground, *price, "--max_usd", "0.9"]) == 1
        assert 0.6 < spent_in(capsys.readouterr().out) <= 0.9, "the limit is kept, and nearly used up"
        before = len(server.requests)
        assert 1 < before < 20
        assert run_judge([*ground, *price, "--max_usd", "9"]) == 0
        assert len(server.requests) == 20, "what was in flight at the limit was paid for and kept"


def test_what_comes_back_too_late_counts_as_spent(tmp_path, capsys):
    ground = write_ground(tmp_path, 3)
    with openai_server.endpoint(lambda body, number: Failure(200, wait_s=1)) as server:
        price = ["--judge", f"{server.url}#judge", "--usd_per_million", "1000,1000", "--max_tokens", "100"]
        assert run_judge([*ground, *price, "--max_usd", "4", "--timeout", "0.5", "--concurrency", "1"]) == 1
        assert len(server.requests) == 2, "a third could cost more than is left"
    assert re.search(r"stopped before \$4.00 would be exceeded; spent \$3\.", capsys.readouterr().err)


def test_a_cache_with_a_list_of_parts_is_read(tmp_path):
    """Earlier versions kept the endpoint's own words, whatever they were."""
    reply = {"finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1, "seconds": 0.1, "cached": False}
    rows = [
        {"key": key, "reply": {**reply, "text": text}}
        for key, text in (("list", [{"type": "text", "text": "8 9"}]), ("half", "\ud835"), ("number", 5))
    ]
    (tmp_path / "cache.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = Cache(tmp_path / "cache.jsonl")
    texts = {key: cache.get(key).text for key in ("list", "half", "number") if key in cache}
    assert texts == {"list": "8 9", "half": "\ufffd"}


def test_a_cache_survives_a_line_that_was_cut(tmp_path):
    """The next reply begins a line of its own, and only the cut one is lost."""
    path = tmp_path / "deep/cache.jsonl"
    Cache(path).put("one", REPLY)
    path.write_bytes(path.read_bytes() + b'{"key": "two", "reply": {"te')
    cache = Cache(path)
    assert (cache.get("one"), cache.get("two")) == (Reply("8 9", "stop", 1, 1, 0.1, cached=True), None)
    cache.put("three", REPLY)
    cache = Cache(path)
    assert [key for key in ("one", "two", "three") if key in cache] == ["one", "three"]
    cache.close()
    path.write_bytes(path.read_bytes() + b'{"key": "four", "reply": {"te')
    cache = Cache(path)
    cache.open()
    cache.put_pause("http://127.0.0.1:9/v1#m", 2e9)
    cache.put("five", REPLY)
    cache.close()
    cache = Cache(path)
    assert cache.pauses == {"http://127.0.0.1:9/v1#m": 2e9}, "a pause is not lost for such a line, either"
    assert [key for key in ("one", "three", "four", "five") if key in cache] == ["one", "three", "five"]


def test_a_finish_reason_of_half_a_character_costs_no_reply(tmp_path):
    Cache(tmp_path / "cache.jsonl").put("one", Reply("8 9", "\ud835", 1, 1, 0.1))
    assert Cache(tmp_path / "cache.jsonl").get("one").finish_reason == "\ufffd"


def test_nothing_is_paid_for_where_nothing_can_be_kept(tmp_path, capsys):
    """The file of replies is opened before the first request, so nothing is asked whose answer would be lost."""
    ground = write_ground(tmp_path, 3)
    (tmp_path / "judged/cache.jsonl").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    with openai_server.endpoint(longer_wins) as server:
        judge = [*ground, "--judge", f"{server.url}#judge"]
        assert "cache.jsonl: cannot be written to (Is a directory)" in error_of(capsys, judge)
        assert "cannot be written to (Not a directory)" in error_of(capsys, [*judge, "-o", str(tmp_path / "file/in")])
        assert "is a file; -o names a directory" in error_of(capsys, [*judge, "-o", str(tmp_path / "file")])
        assert not server.requests


def test_prices_are_given_once_or_for_each_endpoint():
    assert read_prices([], 2) == [FREE, FREE]
    assert read_prices(["2.5,10"], 2) == [(2.5, 10.0)] * 2
    assert read_prices(["1,2", "3,4"], 2) == [(1.0, 2.0), (3.0, 4.0)]
    for wrong in (["1"], ["1,2,3"], ["a,b"], ["-1,2"], ["nan,1"], ["inf,1"], ["1,2", "3,4", "5,6"]):
        with pytest.raises(UserError, match="--usd_per_million must be IN,OUT"):
            read_prices(wrong, 2)
