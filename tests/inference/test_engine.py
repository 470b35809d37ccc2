"""The engine: what it streams is what the library generates, a batch answers like one question alone, long dialogues fit."""

import pytest
import torch

from fastft.data.conversation import Message
from fastft.errors import UserError
from fastft.inference.engine import ChatModel


@pytest.fixture(scope="module")
def chat(ground):
    return ChatModel(str(ground / "model"))


def test_the_oldest_rounds_are_left_out_and_what_cannot_fit_is_refused(chat):
    history = [Message("system", "be kind")]
    for _ in range(60):
        history += [Message("user", "hello there"), Message("assistant", "hello")]
    list(chat.stream([*history, Message("user", "and now?")], max_new_tokens=4))
    with pytest.raises(UserError, match="the model's context length is 512"):
        list(chat.stream([Message("user", "hello " * 600)]))


def test_what_is_streamed_is_what_generate_says(chat):
    """Greedy streaming against the library's own generation, up to the end of turn."""
    question = [Message("user", "hello there")]
    streamed = "".join(chat.stream(question, max_new_tokens=24))
    ids = torch.tensor([chat.template.encode_prompt(question)])
    out = chat.model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=chat.template.stop_token_ids)
    said = chat.template.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert said.startswith(streamed) and len(said) - len(streamed) <= 1  # an unfinished character at the very end


def test_a_batch_answers_like_one_question_alone(chat):
    """Padding on the left changes no answer, and the counts are each question's own."""
    dialogues = [
        [Message("user", text)] for text in ("hello there", "What is a token, and why are there so many of them?")
    ]
    together = chat.answer_batch(dialogues, max_new_tokens=12)
    alone = [chat.answer_batch([dialogue], max_new_tokens=12)[0] for dialogue in dialogues]
    assert together == alone
    assert [answer.prompt_tokens for answer in together] == [len(chat.template.encode_prompt(d)) for d in dialogues]
