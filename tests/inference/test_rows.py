"""The step loop answers as `generate` does, whoever else is answered; texts come whole, character by character."""

import random

import pytest
import torch
from helpers import models, tiny
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fastft.errors import UserError
from fastft.inference.detokenize import AnswerText, TokenBytes
from fastft.inference.rows import SPARE, Answering, StepLoop
from fastft.inference.sampling import CANDIDATES, Sampling, _thresholds_among, sample

PROMPTS = [[5, 6, 7], [9] * 40, [3, 1, 4, 1, 5, 9, 2, 6], [20, 21], list(range(30, 90)), [8, 8, 8, 8]]
TOKENIZER = tiny.byte_level()
BYTES = TokenBytes(TOKENIZER)
TOKENS = len(TOKENIZER)


def load(path, family="llama", **sizes):
    models.make_model(path, family, **sizes)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(tmp_path_factory.mktemp("llama") / "model")


def answering(prompt, max_tokens=12, **more) -> Answering:
    stops = more.pop("stops", ())
    sampling = more.pop("sampling", Sampling(temperature=0))
    return Answering(prompt, sampling, max_tokens, AnswerText(BYTES, stops), **more)


def finish(loop: StepLoop, *groups: list[Answering], late: int = 0) -> None:
    """Run the loop to its end; each group joins `late` steps after the one before it."""
    waiting = list(groups)
    while waiting or loop.busy:
        if waiting:
            loop.add(waiting.pop(0))
        for _ in range(late if waiting else 1):
            loop.step()


def generated(model, prompt, max_tokens=12) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", [*models.FAMILIES])
@pytest.mark.parametrize("late", [0, 3])
def test_every_answer_is_what_generate_gives_for_it_alone(tmp_path, family, late):
    """Rows of uneven lengths that join while others are being answered, and leave before them."""
    model = load(tmp_path / "model", family)
    loop = StepLoop(model, [], 512, max_rows=3)
    lengths = [12, 30, 5, 17, 8, 21]
    answers = [answering(prompt, n) for prompt, n in zip(PROMPTS, lengths)]
    finish(loop, *([a] for a in answers), late=late)
    assert [a.tokens for a in answers] == [generated(model, p, n) for p, n in zip(PROMPTS, lengths)]
    assert {a.finish_reason for a in answers} == {"length"}


@pytest.mark.parametrize(
    "family, alone", [("llama", False), ("qwen3", False), ("mistral", True), ("gemma2", True), ("gemma3_text", True)]
)
def test_models_that_cannot_be_padded_answer_one_request_at_a_time(tmp_path, family, alone):
    loop = StepLoop(load(tmp_path / "model", family), [], 512, max_rows=3)
    assert bool(loop.why_alone) == alone and loop.max_rows == (1 if alone else 3)


def test_recurrent_models_answer_as_generate_does(tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "mamba", vocab_size=TOKENS, hidden_size=32, state_size=8, num_hidden_layers=2, dtype="float32"
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    loop = StepLoop(model, [], 512, max_rows=4)
    answers = [answering(prompt) for prompt in PROMPTS[:3]]
    finish(loop, *([a] for a in answers))
    assert loop.why_alone and [a.tokens for a in answers] == [generated(model, p) for p in PROMPTS[:3]]


def test_rope_that_depends_on_the_longest_row_is_not_batched(tmp_path):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    loop = StepLoop(load(tmp_path / "model", rope_parameters=scaling), [], 1024)
    assert "dynamic" in loop.why_alone


def test_a_prompt_is_read_in_pieces_while_others_are_answered(llama, monkeypatch):
    monkeypatch.setattr("fastft.inference.rows.CHUNK", 16)
    loop, first, second = StepLoop(llama, [], 512), answering(PROMPTS[0], 30), answering(PROMPTS[4], 5)
    loop.add([first])
    loop.step()
    loop.add([second])
    before = len(first.tokens)
    while not second.tokens:
        loop.step()
    assert len(first.tokens) - before >= len(PROMPTS[4]) // 16
    finish(loop)
    assert second.tokens == generated(llama, PROMPTS[4], 5) and first.tokens == generated(llama, PROMPTS[0], 30)


def test_the_same_seed_gives_the_same_answer_alone_and_in_company(llama):
    settings = [
        Sampling(1.0, seed=1), Sampling(0.7, top_p=0.8, seed=2), Sampling(1.5, top_k=7, seed=3),
        Sampling(0.9, min_p=0.05, seed=4), Sampling(1.0, repetition_penalty=1.3, seed=5), Sampling(0.0),
    ]  # fmt: skip
    together = [answering(p, 40, sampling=s) for p, s in zip(PROMPTS, settings)]
    finish(StepLoop(llama, [], 512, max_rows=4), *([a] for a in together), late=2)
    for prompt, sampling, other in zip(PROMPTS, settings, together):
        alone = answering(prompt, 40, sampling=sampling)
        finish(StepLoop(llama, [], 512), [alone])
        assert alone.tokens == other.tokens


def test_several_answers_to_a_prompt_are_read_once_and_drawn_apart(llama, monkeypatch):
    loop, pieces = StepLoop(llama, [], 512), []
    real = loop._forward
    monkeypatch.setattr(loop, "_forward", lambda piece, reading: pieces.append(piece) or real(piece, reading))
    answers = [answering(PROMPTS[1], sampling=Sampling(seed=1), choice=i) for i in range(4)]
    finish(loop, answers)
    assert pieces == [PROMPTS[1]] and len({tuple(a.tokens) for a in answers}) == 4
    single = answering(PROMPTS[1], sampling=Sampling(seed=1))
    finish(loop, [single])
    assert single.tokens == answers[0].tokens


def test_who_is_removed_leaves_the_others_as_they_are(llama):
    loop = StepLoop(llama, [], 512, max_rows=3)
    answers = [answering(p, 20) for p in PROMPTS]
    for a in answers:
        loop.add([a])
    for _ in range(4):
        loop.step()
    loop.remove([answers[1], answers[5]])  # a row, and one that waits
    finish(loop)
    assert not answers[1].done and not answers[5].tokens
    for i in (0, 2, 3, 4):
        assert answers[i].tokens == generated(llama, PROMPTS[i], 20)


def test_rows_that_the_memory_does_not_hold_wait_and_lose_no_token(llama):
    """The last to come gives its place up when the cache outgrows the memory, and is read again when there is room."""
    of_a_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, fp32
    loop = StepLoop(llama, [], 512, memory=2 * (SPARE + 60) * of_a_token)
    answers = [answering([7, 8, 9], 150), answering([4, 5], 150), answering([1, 2, 3], 150)]
    most, most_rows = 0, 0
    for a in answers:
        loop.add([a])
    while loop.busy:
        loop.step()
        most_rows = max(most_rows, len(loop.rows))
        if len(loop.rows) > 1:
            held = sum(each.nbytes for layer in loop._cache.cache.layers for each in layer.stored)
            most = max(most, held)
    assert most_rows == 2 and 0 < most <= loop.memory
    assert [a.tokens for a in answers] == [generated(llama, list(a.prompt), 150) for a in answers]


def test_the_cache_shrinks_when_the_longest_row_leaves(llama):
    loop = StepLoop(llama, [], 512)
    long, short = answering(list(range(100)), 3), answering([5, 6], 30)
    loop.add([long])
    loop.add([short])
    while not long.done:
        loop.step()
    assert loop._cache.end == 2 + len(short.tokens) - 1
    finish(loop)
    assert short.tokens == generated(llama, [5, 6], 30)


def test_a_prompt_that_fails_takes_nobody_along(llama):
    loop, good, bad = StepLoop(llama, [], 512), answering(PROMPTS[0], 20), answering([10**6], 20)
    loop.add([good])
    loop.step()
    loop.add([bad])
    errors = [delta for delta in loop.step() if delta.error]
    assert [delta.answering for delta in errors] == [bad]
    finish(loop)
    assert good.tokens == generated(llama, PROMPTS[0], 20)


def test_logits_that_are_no_numbers_end_that_row_only(llama, monkeypatch):
    loop, rows = StepLoop(llama, [], 512), [answering(p, 10) for p in PROMPTS[:3]]
    for row in rows:
        loop.add([row])
    loop.step()
    real = loop._call

    def broken(ids, cache, **inputs):
        logits = real(ids, cache, **inputs)
        logits[1] = float("nan")
        return logits

    monkeypatch.setattr(loop, "_call", broken)
    failed = [delta.answering for delta in loop.step() if delta.error]
    monkeypatch.undo()
    finish(loop)
    assert failed == [rows[1]]
    assert rows[0].tokens == generated(llama, PROMPTS[0], 10) and rows[2].tokens == generated(llama, PROMPTS[2], 10)


def test_an_answer_ends_at_its_stop_token_unless_that_is_ignored(llama):
    expected = generated(llama, PROMPTS[2], 12)
    stop = expected[4]
    first = expected.index(stop)
    ends, goes_on = answering(PROMPTS[2]), answering(PROMPTS[2], ignore_end=True)
    finish(StepLoop(llama, [stop], 512), [ends], [goes_on])
    assert ends.tokens == expected[: first + 1] and ends.finish_reason == "stop"
    assert goes_on.tokens == expected and goes_on.finish_reason == "length"


def test_logprobs_are_the_models_own(llama):
    answer = answering(PROMPTS[0], 6, top_logprobs=3, sampling=Sampling(0.5, top_k=2, seed=1))
    loop, reported = StepLoop(llama, [], 512), []
    loop.add([answer])
    while loop.busy:
        reported += [entry for delta in loop.step() for entry in delta.logprobs]
    logits = llama(torch.tensor([[*PROMPTS[0], *answer.tokens]])).logits[0, len(PROMPTS[0]) - 1 : -1]
    expected = logits.detach().log_softmax(-1)
    assert [entry.token for entry in reported] == answer.tokens
    for i, entry in enumerate(reported):
        assert entry.logprob == pytest.approx(float(expected[i, entry.token]), abs=1e-4)
        assert [token for token, _ in entry.top] == expected[i].topk(3).indices.tolist()


# Sampling ------------------------------------------------------------------------------------------------------------------


def kept_by_transformers(logits_V, sampling: Sampling) -> set[int]:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits_V[None])
    for value, off, warper in (
        (sampling.top_k, 0, TopKLogitsWarper), (sampling.top_p, 1.0, TopPLogitsWarper), (sampling.min_p, 0.0, MinPLogitsWarper),
    ):  # fmt: skip
        scores = scores if value == off else warper(value)(None, scores)
    return set(scores[0].isfinite().nonzero().flatten().tolist())


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 2.0),
    top_k=st.sampled_from([0, 1, 5, CANDIDATES, CANDIDATES + 5, 5000]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3]),
)
def test_the_filters_keep_what_those_of_transformers_keep(seed, temperature, top_k, top_p, min_p):
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(seed)) * 3
    sampling = Sampling(temperature, top_k, top_p, min_p)
    # The largest draw that still gives a token, and the numbers between: every kept token is found, and no other.
    expected = kept_by_transformers(logits[0], sampling)
    found = {int(sample(logits, [sampling], [u])) for u in [0.0, 1 - 2**-53, *(i / 300 for i in range(300))]}
    assert found <= expected
    probs = (logits / temperature).softmax(-1)
    threshold = _thresholds_among(probs, [sampling], 1000)
    kept = set((probs[0] >= threshold[0]).nonzero().flatten().tolist())
    assert len(kept ^ expected) <= 1  # a token at the very edge of top_p may fall on either side


def test_tokens_come_as_often_as_their_probabilities_say():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).log_softmax(-1)
    draws = random.Random(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[int(sample(logits, [Sampling(1.0)], [draws.random()]))] += 1
    assert (counts / 4000 - logits.exp()[0]).abs().max() < 0.03


def test_rows_with_different_settings_do_not_look_at_each_other():
    logits = torch.randn(5, 800, generator=torch.Generator().manual_seed(1)) * 4
    settings = [Sampling(0), Sampling(1, top_k=600), Sampling(0.3, top_p=0.5), Sampling(2.0), Sampling(1e-30)]
    draws = [0.1, 0.5, 0.7, 0.999, 0.3]
    together = sample(logits, settings, draws).tolist()
    assert together == [int(sample(logits[i : i + 1], [settings[i]], [draws[i]])) for i in range(5)]


def test_seeds_of_any_size_and_sign_are_different_seeds():
    first = [Sampling(seed=seed).draws().random() for seed in (-1, 0, 1, 2**63 - 1, -(2**63))]
    assert len(set(first)) == len(first)
    assert Sampling().draws().random() != Sampling().draws().random()


# Text ----------------------------------------------------------------------------------------------------------------------


def pieces_of(tokens, stops=(), token_bytes=BYTES, separator="") -> list[str]:
    text = AnswerText(token_bytes, stops, separator)
    pieces = []
    for token in tokens:
        pieces.append(text.add(token))
        if text.stopped:
            return pieces
    return [*pieces, text.end()]


@given(st.lists(st.integers(0, TOKENS - 1), max_size=60))
def test_the_pieces_of_random_tokens_are_the_whole_decode(tokens):
    whole = TOKENIZER.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces_of(tokens)) == whole


@given(st.binary(max_size=40))
def test_the_pieces_of_random_bytes_are_the_whole_decode(content):
    spelled = {BYTES.spelled(i): i for i in range(TOKENS) if len(BYTES.spelled(i)) == 1}
    tokens = [spelled[bytes([byte])] for byte in content]
    assert "".join(pieces_of(tokens)) == content.decode("utf-8", "replace")


@pytest.mark.parametrize("kind", tiny.KINDS)
@given(text=st.text(alphabet="ab c\n é日🙂👩\u200d👧", max_size=40))
def test_the_pieces_of_a_text_are_the_tokenizers_text(kind, text):
    tokenizer = tiny.KINDS[kind]()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces_of(tokens, token_bytes=TokenBytes(tokenizer))) == whole


def test_a_character_comes_whole():
    text = "👩\u200d👩\u200d👧 日本"
    pieces = pieces_of(TOKENIZER.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


@given(
    text=st.text(alphabet="abc🙂", max_size=20),
    stops=st.lists(st.text(alphabet="abc🙂", min_size=1, max_size=4), min_size=1, max_size=4),
)
@example(text="cabc", stops=["bc", "abc"])  # complete at the same time: nothing of either leaks
@example(text="aabc 🙂", stops=["abc 🙂", "bc"])
def test_a_stop_string_is_found_wherever_the_tokens_end(text, stops):
    """Cut into any tokens, the answer ends before the stop string that is complete first, and not a letter of it leaks."""
    spelled = {BYTES.spelled(i): i for i in range(TOKENS) if len(BYTES.spelled(i)) == 1}
    by_bytes = [spelled[bytes([byte])] for byte in text.encode()]
    by_words = TOKENIZER.encode(text, add_special_tokens=False)
    ends = [(i + len(s), i) for s in stops for i in range(len(text)) if text.startswith(s, i)]
    expected = text[: min(ends)[1]] if ends else text
    for tokens in (by_bytes, by_words):
        assert "".join(pieces_of(tokens, tuple(stops))) == expected


@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("hello there", ("hello",), ""),  # at the very first token
        ("one two three", ("two three four", "two th"), "one "),  # one a prefix of another
        ("a 👩\u200d👩\u200d👧 b", ("\u200d👧",), "a 👩\u200d👩"),  # inside an emoji
        ("the end of a", ("a row",), "the end of a"),  # held back, and given out at the end
    ],
)
def test_an_answer_ends_before_the_first_stop_string(text, stops, expected):
    assert "".join(pieces_of(TOKENIZER.encode(text, add_special_tokens=False), stops)) == expected


def test_logprobs_of_a_stop_string_do_not_leak(llama):
    plain = answering(PROMPTS[3], 30)
    finish(StepLoop(llama, [], 512), [plain])
    whole = "".join(pieces_of(plain.tokens))
    stop = whole[len(whole) // 2 :][:3]
    answer = answering(PROMPTS[3], 30, stops=(stop,), top_logprobs=0)
    loop, text, entries = StepLoop(llama, [], 512), "", []
    loop.add([answer])
    while loop.busy:
        for delta in loop.step():
            text += delta.text
            entries += delta.logprobs
    assert text == whole[: whole.index(stop)] and answer.finish_reason == "stop"
    assert entries and [e.token for e in entries] == plain.tokens[: len(entries)]
    assert len(BYTES.of(plain.tokens[len(entries)])) and "".join(pieces_of(e.token for e in entries)).startswith(text)
    assert not "".join(pieces_of(e.token for e in entries[:-1])).startswith(whole[: len(text) + 1])


def test_the_templates_separator_is_no_part_of_an_answer():
    tokens = TOKENIZER.encode(" hello", add_special_tokens=False)
    assert "".join(pieces_of(tokens, separator=" ")) == "hello"
    assert "".join(pieces_of(tokens)) == " hello"
    assert "".join(pieces_of(TOKENIZER.encode("hello", add_special_tokens=False), separator="  ")) == "hello"


def test_a_tokenizer_whose_text_is_not_the_sum_of_its_tokens_is_refused():
    import copy

    from tokenizers import decoders

    tokenizer = copy.deepcopy(tiny.byte_level())
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="cannot be streamed"):
        TokenBytes(tokenizer, "m")
