"""The token cache: the same from one process as from several, and nothing in it that has not passed the proof of its masks."""

import logging

import pytest

from fastft.data import tokenize as tokenizing
from fastft.data.conversation import read_conversations
from fastft.data.dataset import tokenized
from fastft.data.template.chat_template import ChatTemplate, load_template
from fastft.errors import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of tokens for one test alone."""
    monkeypatch.setenv("FASTFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def taken(cache) -> bytes:
    """The one file of the cache, which is removed."""
    [file] = cache.iterdir()
    content = file.read_bytes()
    file.unlink()
    return content


@pytest.mark.parametrize("split_to", [None, 40])
def test_several_processes_write_what_one_writes(ground, cache, monkeypatch, split_to, caplog):
    monkeypatch.setattr(tokenizing, "BATCH", 4)
    monkeypatch.setattr(tokenizing, "PROGRESS_EVERY", 8)
    template = load_template(str(ground / "model"))
    tokenized(str(ground / "data.jsonl"), template, split_to)
    alone = taken(cache)
    monkeypatch.setattr(tokenizing, "PARALLEL_FROM", 8)
    monkeypatch.setattr(tokenizing.os, "sched_getaffinity", lambda process: {0, 1})
    caplog.clear()
    with caplog.at_level(logging.INFO, "fastft"):
        tokenized(str(ground / "data.jsonl"), template, split_to)
    assert taken(cache) == alone
    assert caplog.messages == [f"tokenised {done} conversations" for done in (8, 16, 24)]


def test_a_damaged_cache_is_made_again(ground, cache, caplog):
    data, template = str(ground / "data.jsonl"), load_template(str(ground / "model"))
    ids = [each.tolist() for each in tokenized(data, template).ids]
    [file] = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    assert [each.tolist() for each in tokenized(data, template).ids] == ids
    assert [message for message in caplog.messages if "this token file is damaged" in message]


def test_a_mask_that_is_off_is_refused_by_name_and_nothing_is_cached(ground, cache, monkeypatch):
    encode_many = ChatTemplate.encode_many

    def one_too_many(self, conversations):
        encoded = encode_many(self, conversations)
        first = next(each for each in encoded if True in each.trained)
        first.trained[first.trained.index(True) - 1] = True
        return encoded

    monkeypatch.setattr(ChatTemplate, "encode_many", one_too_many)
    conversations = read_conversations(ground / "data.jsonl")
    name = next(c.id for c in conversations if any(m.train for m in c.messages))
    with pytest.raises(UserError, match=f"data.jsonl: conversation '{name}': the mask is off"):
        tokenized(str(ground / "data.jsonl"), load_template(str(ground / "model")))
    assert not list(cache.iterdir())
