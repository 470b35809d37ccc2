"""Addresses and keys: what is not an address is refused, and a key is sent only to the endpoint that it was made for."""

import pytest
from helpers import openai_server
from helpers.judging import SECRET, error_of, longer_wins, run_answer, run_judge, write_ground
from helpers.openai_server import Failure

from fastft.errors import UserError
from fastft.inference.endpoint import KEY, EndpointConfig, Limits, key_for, split_address

OTHER = "sk-another-endpoints-key"


def test_an_address_is_a_url_and_a_name():
    assert split_address("https://api.openai.com/v1/#gpt-4.1") == ("https://api.openai.com/v1", "gpt-4.1")
    for wrong in (
        "https://api.openai.com/v1",
        "ftp://x#y",
        "#y",
        "gpt",
        "http://127.0.0.1:abc/v1#j",
        "http://[::1/v1#j",
    ):
        with pytest.raises(UserError, match="URL#name"):
            split_address(wrong)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:notaport/v1", "http://127.0.0.1:99999/v1", "http://[::1/v1", "api.openai.com/v1"]
)
def test_a_base_url_that_is_none_is_one_line(tmp_path, monkeypatch, capsys, url):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    says = error_of(capsys, [*write_ground(tmp_path, 1), "--judge", "http://127.0.0.1:9/v1#j"])
    assert f"OPENAI_BASE_URL is '{url}', which is no URL such as https://api.openai.com/v1; correct or unset it" in says


def test_a_base_url_is_shown_without_its_password(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://me:{SECRET}@127.0.0.1:x/v1")
    with pytest.raises(UserError) as caught:
        key_for("http://127.0.0.1:9/v1")
    assert SECRET not in str(caught.value)


def test_a_bad_address_with_a_key_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", OTHER)
    for address in ("http://[::1/v1#j", "http://127.0.0.1:99999/v1#j"):
        options = ["--judge", address, "--judge_key_env", "OTHER_KEY"]
        assert "must be URL#name" in error_of(capsys, [*write_ground(tmp_path, 1), *options])


def test_a_proxy_whose_address_is_none_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:notaport")
    says = error_of(capsys, [*write_ground(tmp_path, 1), "--judge", "https://api.openai.com/v1#j"])
    assert (
        "the proxy that the environment names cannot be used (Port could not be cast to integer value as 'notaport')"
        in says
    )


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


def test_each_endpoint_gets_the_key_named_for_it(tmp_path, monkeypatch, capsys):
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


def test_limits_and_money_that_make_no_sense_are_refused():
    for wrong in ({"concurrency": 0}, {"rpm": -1}, {"tpm": float("nan")}, {"timeout": 0}):
        with pytest.raises(UserError, match="--concurrency must be at least 1"):
            EndpointConfig(**wrong)
    with pytest.raises(UserError, match="--max_usd needs"):
        EndpointConfig(max_usd=1)
    assert EndpointConfig().limits == Limits()
