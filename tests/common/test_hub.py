"""A model's name with a typing error is one line within seconds for every verb, also on a machine without a network."""

import socket
import threading

import pytest
from huggingface_hub import constants

from fastft import cli
from fastft.common import hub
from fastft.errors import UserError


@pytest.fixture
def silent_hub(monkeypatch, tmp_path):
    """A Hub that drops every connection, and an empty cache. Gives the list of connections."""
    taken: list[socket.socket] = []

    def drop() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            taken.append(connection)
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drop, daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        hub.require_found.cache_clear()
        yield taken
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    hub.require_found.cache_clear()


@pytest.mark.parametrize(
    "verb",
    [
        "chat --model some/modle",
        "inspect DATA --model some/modle",
        "estimate --model some/modle --tokens 1000",
        "answer --model some/modle -o OUT",
        "train --model some/modle --data DATA --output_dir OUT",
        "clean DATA -o OUT --model some/modle --max_tokens 512",
    ],
)
def test_every_verb_asks_the_hub_without_retries_and_says_that_it_cannot_be_reached(
    verb, data, silent_hub, tmp_path, capsys
):
    places = {"DATA": str(data), "OUT": str(tmp_path / "out")}
    assert cli.main([places.get(word, word) for word in verb.split()]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: some/modle: no such directory, and the Hugging Face Hub cannot be reached (")
    assert 1 <= len(silent_hub) <= 2, "transformers itself would have tried again and again"


def test_what_is_here_or_was_fetched_before_needs_no_hub(silent_hub, model, tmp_path):
    hub.require_found(str(model))
    snapshot = tmp_path / "cache/models--some--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer_config.json").write_text("{}")
    (tmp_path / "cache/models--some--model/refs").mkdir()
    (tmp_path / "cache/models--some--model/refs/main").write_text("abc")
    hub.require_found("some/model")
    assert not silent_hub


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/model", "~/nowhere", "runs/first/model"])
def test_what_can_only_be_a_path_is_not_asked_for(path, silent_hub):
    with pytest.raises(UserError, match=r"no such directory$"):
        hub.require_found(path)
    assert not silent_hub
