"""The likelihood of an answer is the same with caches and batches as in one pass over the whole text."""

import numpy as np
import pytest
import torch
from helpers import models

from fastft.data.conversation import Message
from fastft.errors import UserError
from fastft.inference.engine import ChatModel
from fastft.inference.likelihood import answer_likelihoods, tokens_of_answers

TOLD = "A packing plan puts conversations into rows, and every row is full. "
ANSWERS = ["yes", "no", "no idea at all", "The lazy dog"]


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "qwen3"])
def chat(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "model"
    models.make_model(path, request.param)
    return ChatModel(str(path))


def dialogues(told: str) -> list[list[Message]]:
    texts = ["hello", "hello there, how are you?", "What is a token?", "hello", "x = [1, 2]"]
    return [[*([Message("system", told)] if told else []), Message("user", text)] for text in texts]


@pytest.mark.parametrize("told", ["", TOLD, TOLD * 3])
def test_scores_equal_those_of_one_pass_over_the_whole_text(chat, told):
    """Prefixes shorter and longer than a sliding window, batches of equal lengths, answers of one token and of several."""
    given = dialogues(told)
    found = answer_likelihoods(chat, given, ANSWERS, batch_size=2)
    for row, messages in enumerate(given):
        prompt = chat.template.encode_prompt(messages)
        for column, answer in enumerate(tokens_of_answers(chat, ANSWERS)):
            with torch.inference_mode():
                logits_TV = chat.model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            wanted = sum(float(logits_TV[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
            assert found[row, column] == pytest.approx(wanted, abs=2e-4)


def test_the_end_of_turn_counts_where_one_answer_begins_another(chat):
    end = chat.template.end_of_turn_id
    assert all(ids[-1] == end for ids in tokens_of_answers(chat, ["no", "no idea"]))
    assert not any(end in ids for ids in tokens_of_answers(chat, ["yes", "no"]))


def test_every_batch_is_reported_once(chat):
    seen: dict[int, np.ndarray] = {}
    found = answer_likelihoods(chat, dialogues(TOLD), ANSWERS, 2, lambda places, rows: seen.update(zip(places, rows)))
    assert sorted(seen) == list(range(5))
    np.testing.assert_array_equal(np.stack([seen[place] for place in range(5)]), found)


def test_a_prompt_that_does_not_fit_is_refused(chat):
    with pytest.raises(UserError, match="tokens long; the model's context is"):
        answer_likelihoods(chat, dialogues(TOLD * 400), ANSWERS)
