"""What a worker accepts and what it refuses: the bodies that real clients send, and those that nobody can answer."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.serve.arena.battles import _questions
from fastft.serve.arena.votes import outcomes
from fastft.serve.protocol import ApiError, read_request, text_of, text_parts

USER = {"role": "user", "content": "hi"}
CHAT = {"model": "m", "messages": [USER]}


def read(chat: bool = True, **more):
    body = CHAT if chat else {"model": "m", "prompt": "hi"}
    return read_request(json.dumps({**body, **more}).encode(), chat)


def refusal(body: bytes | dict, chat: bool = True) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_request(body if isinstance(body, bytes) else json.dumps(body).encode(), chat)
    error = caught.value
    assert set(error.content()["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in error.message and len(error.message) < 400
    return error


@pytest.mark.parametrize(
    "more, field, value",
    [
        ({}, "stream", False),
        ({"stream": True}, "stream", True),
        ({"stream": False}, "stream", False),
        ({"stream": True, "stream_options": {"include_usage": True}}, "include_usage", True),
        ({"max_tokens": 7}, "max_tokens", 7),
        ({"max_completion_tokens": 7}, "max_tokens", 7),
        ({"max_tokens": 9, "max_completion_tokens": 7}, "max_tokens", 7),
        ({"max_tokens": 5, "max_completion_tokens": 7}, "max_tokens", 5),
        ({"max_tokens": None}, "max_tokens", None),
        ({"stop": "a"}, "stop", ("a",)),
        ({"stop": ["a", "b", "c", "d"]}, "stop", ("a", "b", "c", "d")),
        ({"stop": None}, "stop", ()),
        ({"stop": []}, "stop", ()),
        ({"n": 1}, "n", 1),
        ({"n": 3}, "n", 3),
        ({"logprobs": True}, "top_logprobs", 0),
        ({"logprobs": True, "top_logprobs": 20}, "top_logprobs", 20),
        ({"logprobs": False}, "top_logprobs", None),
        ({"presence_penalty": 0, "frequency_penalty": 0.0}, "n", 1),
        ({"response_format": {"type": "text"}}, "n", 1),
        ({"logit_bias": {}}, "n", 1),
        ({"tool_choice": "auto"}, "n", 1),
        ({"ignore_eos": True}, "ignore_eos", True),
    ],
)
def test_parameters_are_read(more, field, value):
    request = read(**more)
    assert getattr(request, field) == value and request.ignored == ()


@pytest.mark.parametrize(
    "more, field, value",
    [
        ({}, "temperature", 1.0),
        ({"temperature": 0}, "temperature", 0.0),
        ({"temperature": 2}, "temperature", 2.0),
        ({"temperature": None}, "temperature", 1.0),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"seed": -5}, "seed", -5),
        ({"seed": 2**63}, "seed", 2**63),
        ({"top_k": 0}, "top_k", 0),
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": 40}, "top_k", 40),
        ({"min_p": 0.1}, "min_p", 0.1),
        ({"repetition_penalty": 1.1}, "repetition_penalty", 1.1),
    ],
)
def test_sampling_is_read(more, field, value):
    assert getattr(read(**more).sampling, field) == value


@pytest.mark.parametrize(
    "more, named",
    [
        ({"user": "u", "metadata": {"a": "b"}, "store": False}, ()),
        ({"parallel_tool_calls": True}, ("parallel_tool_calls",)),
        ({"service_tier": "auto"}, ("service_tier",)),
        ({"reasoning_effort": "low"}, ("reasoning_effort",)),
        ({"tools": [{"type": "function"}]}, ("tools",)),
        ({"tools": []}, ()),
        ({"stream_options": {"include_obfuscation": False}}, ("stream_options.include_obfuscation",)),
        ({"temprature": 1}, ("temprature",)),
        ({"a\r\nset-cookie: b": 1}, ()),
    ],
)
def test_what_is_left_out_is_named(more, named):
    """Names that cannot be in a header are not put there."""
    assert read(**more).ignored == named


@pytest.mark.parametrize(
    "message, role, content",
    [
        ({"role": "developer", "content": "be brief"}, "system", "be brief"),
        ({"role": "system", "content": ""}, "system", ""),
        ({"role": "assistant", "content": None}, "assistant", ""),
        ({"role": "assistant", "content": ""}, "assistant", ""),
        ({"role": "assistant"}, "assistant", ""),
        ({"role": "tool", "content": "4", "tool_call_id": "c1"}, "tool", "4"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "user", "a\nb"),
    ],
)
def test_messages_are_read(message, role, content):
    read_message = read(messages=[message, USER]).messages[0]
    assert (read_message.role, read_message.content) == (role, content)


def test_calls_in_a_message_are_left_out_and_named():
    assistant = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function"}]}
    assert read(messages=[USER, assistant, USER]).ignored == ("messages.tool_calls",)


@pytest.mark.parametrize(
    "more, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [USER, {"role": "wizard", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"temperature": "NaN"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 1.5}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": list("abcde")}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": True}, "stream_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"response_format": "text"}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
    ],
)
def test_parameters_that_cannot_be_meant_are_refused_by_name(more, param):
    error = refusal({**CHAT, **more})
    assert (error.status, error.kind, error.param) == (400, "invalid_request_error", param)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'"x"', b'{"model": "m", "temperature": NaN}', b'{"model": "\xff"}', b'{"model": "\\ud800"}',
        b'{"model": "m", "messages": ' + b"[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(body):
    assert refusal(body).code == "invalid_json"


@pytest.mark.parametrize(
    "prompt, prompts",
    [("hi", ("hi",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1, 2], [3]], ((1, 2), (3,))), ("", ("",))],
)
def test_prompts_of_completions_are_texts_or_tokens(prompt, prompts):
    assert read(chat=False, prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "more, param",
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_completions_that_cannot_be_meant_are_refused_by_name(more, param):
    assert refusal({"model": "m", "prompt": "hi", **more}, chat=False).param == param


def test_what_lm_eval_sends_with_a_completion_is_accepted():
    request = read(
        chat=False, prompt=["a"], max_tokens=256, temperature=0, stop=["\n"], seed=1234, best_of=1, echo=False
    )
    assert request.ignored == () and request.stop == ("\n",)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = (
    "model messages prompt temperature top_p top_k min_p seed stop n stream stream_options max_tokens logprobs top_logprobs "
    "tools tool_choice response_format logit_bias presence_penalty echo suffix best_of modalities functions"
).split()


@given(st.dictionaries(st.sampled_from(NAMES), JSON), st.booleans())
def test_any_object_is_read_or_refused(content, chat):
    body = {"model": "m", "messages": [USER], "prompt": "x", **content}
    try:
        read_request(json.dumps(body).encode(), chat)
    except ApiError as error:
        assert 400 <= error.status < 500


@pytest.mark.parametrize(
    "content, text, parts",
    [
        ("hello", "hello", ["hello"]),
        ("", "", [""]),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb", ["a", "b"]),
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}], None, ["a"]),
        ([], "", []),
        (None, None, []),
        ({"text": "a"}, None, []),
        (["a"], None, []),
    ],
)
def test_a_content_is_one_text_or_has_texts_among_other_parts(content, text, parts):
    assert text_of(content) == text and text_parts(content) == parts


def test_a_question_in_parts_is_the_same_question_for_votes_and_a_routers_outcomes():

    parts = [{"type": "text", "text": "Who?"}]
    assert (
        _questions([{"role": "user", "content": parts}])
        == _questions([{"role": "user", "content": "Who?"}])
        == ["Who?"]
    )
    vote = {"turns": {"a": ["1"], "b": ["2"]}, "question": "q", "models": {"a": "x", "b": "y"}, "winner": "a"}
    [row] = outcomes([vote], [{"id": "1", "messages": [{"role": "user", "content": parts}]}])
    assert row["query"] == "Who?" and row["rewards"] == {"x": 1.0, "y": 0.0}
