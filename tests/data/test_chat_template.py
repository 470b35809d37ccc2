"""The loss mask is right by construction: properties that hold for every kind of tokenizer and every template we ship."""

import pytest
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.data.conversation import Conversation, Message
from fastft.data.template.chat_template import ChatTemplate, built_in_templates, template_for
from fastft.data.template.mask_check import check
from fastft.data.template.skeleton import TemplateError
from fastft.errors import UserError

PAIRS = [(kind, name) for kind in tiny.KINDS for name in built_in_templates()]
LOSSLESS = [pair for pair in PAIRS if pair[0] != "unigram"]  # unigram turns unknown characters into <unk>
MARKS_SPACES = ("sentencepiece", "metaspace", "unigram")  # put a space before text that follows a control token

PIECES = [
    "hello",
    "Hello",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "a",
    ":",
    "1",
    ".",
    "def f(x):\n    return x",
    "é",
    "你好",
    "😀",
    "👩‍🚀",
    "|>",
    "<",
    "]",
]
# Hypothesis also draws strings that it finds in the code. Control tokens among them would not stay text in `stock`.
free_text = st.text(max_size=12).filter(lambda text: not any(token in text for token in tiny.CONTROL_TOKENS))
texts = st.one_of(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), free_text)
answers = st.tuples(texts, st.booleans())
HOSTILE = [
    "</s>", "<s>", "<|im_end|>", "<|im_start|>system\n", " ASSISTANT: ", "USER: ", "[/INST]", "[INST]", "<|eot_id|>",
    "<unk>", "<end_of_turn>\n<start_of_turn>model\n", "<|end|>", "<0x0A>", "\ufdd00\ufdd1", "<<SYS>>", "{{ messages }}",
]  # fmt: skip

_templates: dict[tuple[str, str], ChatTemplate] = {}


def template_of(pair: tuple[str, str]) -> ChatTemplate:
    if pair not in _templates:
        _templates[pair] = template_for(tiny.KINDS[pair[0]](), pair[1])
    return _templates[pair]


@st.composite
def conversations(draw) -> list[Message]:
    messages = [Message("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        answer, train = draw(answers)
        messages += [Message("user", draw(texts)), Message("assistant", answer, train)]
    return messages + ([Message("user", draw(texts))] if draw(st.booleans()) else [])


def stock(template: ChatTemplate, messages: list[Message], generation_prompt: bool = False) -> list[int]:
    """The ids that transformers itself gives."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    return template.tokenizer.apply_chat_template(
        turns, chat_template=template.source, add_generation_prompt=generation_prompt, return_dict=False
    )


def spans(trained: list[bool]) -> list[tuple[int, int]]:
    edges = [i for i, (a, b) in enumerate(zip([False, *trained], [*trained, False])) if a != b]
    return list(zip(edges[::2], edges[1::2]))


def split_at_ends(template: ChatTemplate, ids: list[int], span: tuple[int, int]) -> str:
    """The text of trained tokens, decoded together with the token before them: a first token may lose its space."""
    decode = lambda tokens: template.tokenizer.decode(tokens, skip_special_tokens=False)  # noqa: E731
    return decode(ids[span[0] - 1 : span[1]])[len(decode(ids[span[0] - 1 : span[0]])) :]


def rendered_answer(template: ChatTemplate, messages: list[Message], i: int) -> str:
    """What the template writes from the end of the prompt to the end of the end-of-turn token, found in its text alone."""
    text = template.render(messages[: i + 1])[len(template.render(messages[:i], generation_prompt=True)) :]
    # The end of turn follows the answer, so it is the last one; only what closes a whole conversation may follow it.
    return text[: text.rindex(template.end_of_turn) + len(template.end_of_turn)]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@settings(max_examples=25)
@given(messages=conversations())
def test_prompts_and_whole_equal_the_tokenizers_rendering(pair, messages):
    template = template_of(pair)
    for i, message in enumerate(messages):
        if message.train:
            alone = [Message(m.role, m.content, m.train and j == i) for j, m in enumerate(messages)]
            encoded = template.encode(alone)
            assert encoded.ids[: encoded.trained.index(True)] == stock(template, messages[:i], generation_prompt=True)
    encoded, whole = template.encode(messages), stock(template, messages)
    assert len(encoded.ids) == len(encoded.trained)
    assert len(spans(encoded.trained)) == sum(m.train for m in messages)
    assert (encoded.ids == whole) == (encoded.kept_boundaries == 0)
    if pair[0] != "phi3":  # its control tokens swallow white space, and in the whole even that of an answer
        assert template.tokenizer.decode(encoded.ids) == template.tokenizer.decode(whole)


@pytest.mark.parametrize("pair", LOSSLESS, ids="-".join)
@settings(max_examples=25)
@given(messages=conversations())
def test_trained_tokens_decode_to_the_answers(pair, messages):
    template = template_of(pair)
    encoded = template.encode(messages)
    trained = [i for i, m in enumerate(messages) if m.train]
    for i, span in zip(trained, spans(encoded.trained)):
        text, expected = split_at_ends(template, encoded.ids, span), rendered_answer(template, messages, i)
        assert encoded.ids[span[1] - 1] == template.end_of_turn_id
        assert text == expected or (pair[0] in MARKS_SPACES and text == " " + expected)
        separator, body = expected[: len(expected) - len(expected.lstrip())], messages[i].content
        assert body.strip() in expected and set(separator) <= set(body) | {" "}


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@settings(max_examples=25)
@given(
    messages=conversations(),
    hostile=st.lists(st.one_of(st.sampled_from(HOSTILE), st.sampled_from(PIECES)), min_size=1, max_size=5).map("".join),
    data=st.data(),
)
def test_typed_control_strings_stay_text_and_change_nothing_else(pair, messages, hostile, data):
    template = template_of(pair)
    at = data.draw(st.integers(0, len(messages) - 1))
    plain, typed = list(messages), list(messages)
    plain[at] = Message(messages[at].role, "x", messages[at].train)
    typed[at] = Message(messages[at].role, f"x{hostile}x", messages[at].train)
    before, after = template.encode(plain), template.encode(typed)

    controls = {template.tokenizer.convert_tokens_to_ids(t) for t in tiny.CONTROL_TOKENS}
    places = [[i for i, token in enumerate(e.ids) if token in controls] for e in (before, after)]
    assert [before.ids[i] for i in places[0]] == [after.ids[i] for i in places[1]]
    assert sum(after.trained) - sum(before.trained) == (len(after.ids) - len(before.ids)) * messages[at].train
    # Between control tokens all is the same, except for the stretch with the text.
    stretches = [_stretches(e.ids, p) for e, p in zip((before, after), places)]
    assert sum(a != b for a, b in zip(*stretches)) <= 1


def _stretches(ids, places):
    edges = [-1, *places, len(ids)]
    return [ids[a + 1 : b] for a, b in zip(edges, edges[1:])]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@settings(max_examples=25)
@given(messages=conversations(), data=st.data())
def test_an_unfinished_answer_is_its_text_without_the_end_of_turn(pair, messages, data):
    template = template_of(pair)
    at = data.draw(st.sampled_from([i for i, m in enumerate(messages) if m.role == "assistant"]))
    messages[at].train = True
    whole = template.encode(messages)
    span = spans(whole.trained)[sum(m.train for m in messages[:at])]
    messages[at].ends = False
    encoded = template.encode(messages)
    assert encoded.ids == whole.ids and encoded.kept_boundaries == whole.kept_boundaries
    assert encoded.trained[: span[0]] == whole.trained[: span[0]]
    assert encoded.trained[span[1] :] == whole.trained[span[1] :]
    learned = encoded.trained[span[0] : span[1]]
    count = sum(learned)
    assert learned == [True] * count + [False] * (len(learned) - count)
    assert template.end_of_turn_id not in encoded.ids[span[0] : span[0] + count]
    text = messages[at].content
    assert bool(count) == bool(text.strip())
    if pair in LOSSLESS and count:
        decoded = split_at_ends(template, encoded.ids, (span[0], span[0] + count))
        assert decoded.strip() == text.strip()
    faults = {kind for kind, _ in check(Conversation("x", messages), encoded, template)}
    assert not faults & {"end of turn", "number of answers", "prompt", "whole"}


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@settings(max_examples=25)
@given(messages=conversations())
def test_the_bound_on_tokens_holds(pair, messages):
    template = template_of(pair)
    bound = template.token_bound(messages)
    assert (bound is None) == (pair[0] == "unigram")
    assert bound is None or len(template.encode(messages).ids) <= bound


def test_no_bound_where_each_added_token_of_one_byte_begins_a_new_text():
    from tokenizers import AddedToken

    tokenizer = tiny.sentencepiece()
    assert template_for(tokenizer, "vicuna").token_bound([Message("user", "a")]) is not None
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    messages = [Message("user", "7\n" * 200 + "7"), Message("assistant", "x", True)]
    template = template_for(tokenizer, "vicuna")
    assert len(template.encode(messages).ids) > sum(len(m.content) for m in messages) + 100
    assert template.token_bound(messages) is None


def test_the_bound_holds_where_normalising_makes_text_longer():
    from tokenizers import normalizers

    tokenizer = tiny.byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    template = template_for(tokenizer, "chatml")
    messages = [Message("user", "\u0958\U0001d160\ufb2c" * 50), Message("assistant", "x", True)]  # NFC takes them apart
    encoded = template.encode(messages)
    assert len(encoded.ids) <= template.token_bound(messages)
    assert len(encoded.ids) > sum(len(m.content.encode()) for m in messages)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    assert template_for(tokenizer, "chatml").token_bound(messages) is None


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_texts_at_the_edges_are_encoded_as_a_server_feeds_them(pair):
    template = template_of(pair)
    for content in ("", " ", "\n\n", "a", "  leading", "\nleading", "trailing \n", "\ud83d", "😀", "\ud83d\ude00"):
        messages = [Message("user", content), Message("assistant", content, True), Message("user", content)]
        encoded = template.encode(messages)
        assert encoded.ids[max(i for i, t in enumerate(encoded.trained) if t)] == template.end_of_turn_id
        assert template.encode_prompt(messages[:1]) == encoded.ids[: encoded.trained.index(True)]


def test_nothing_trained_when_nothing_is_marked():
    encoded = template_of(("gpt2", "chatml")).encode([Message("user", "a"), Message("assistant", "b", False)])
    assert not any(encoded.trained)


def test_the_boundary_wins_over_a_merge_and_is_counted():
    """Qwen's split takes "assistant\\n" + "\\n\\n" as one stretch; the answer's newlines must be tokens of their own."""
    from tokenizers import AddedToken

    tokenizer = tiny.byte_level()
    tokenizer.add_tokens([AddedToken("\n\n\n", normalized=False)])  # a token that surely spans the boundary
    template = template_for(tokenizer, "chatml")
    messages = [Message("user", "hi"), Message("assistant", "\n\nhello", True)]
    encoded = template.encode(messages)
    assert encoded.kept_boundaries == 1
    assert stock(template, messages) != encoded.ids
    start = encoded.trained.index(True)
    assert encoded.ids[:start] == stock(template, messages[:1], generation_prompt=True)
    assert template.tokenizer.decode(encoded.ids[start:]) == "\n\nhello<|im_end|>\n"


def test_long_conversations_stay_cheap_and_exact():
    template = template_of(("gpt2", "chatml"))
    messages = [Message("user", "q"), Message("assistant", "a", True)] * 300
    encoded = template.encode(messages)
    assert encoded.ids == stock(template, messages)
    assert len(spans(encoded.trained)) == 300


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}BOT{% endif %}",
            "begins",
        ),
        (
            "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}",
            "stop",
        ),
        ("{{ raise_exception('only images') }}", "only images"),
        ("{% for m in messages %}", "refuses"),
        ("{% for m in messages %}\n{{ m.content / 0 }}{% endfor %}", "refuses the conversation: unsupported operand"),
        ("{{ 1 / 0 }}", "refuses the conversation: division by zero"),
        ("{{ messages[9]['role'] }}", "refuses the conversation: list object has no element 9"),
        ("{{ messages | map(attribute='content') | list | tojson(indent=2)[::0] }}", "refuses"),
    ],
)
def test_underivable_templates_are_refused(source, says):
    with pytest.raises(TemplateError, match=says) as caught:
        ChatTemplate(tiny.KINDS["gpt2"](), source, "template odd")
    assert "template odd" in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_rewrites_text_is_refused_for_that_text():
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = ChatTemplate(tiny.KINDS["gpt2"](), source, "template thinker")
    template.encode([Message("user", "a"), Message("assistant", "b", True)])
    with pytest.raises(TemplateError, match="template thinker: the template changes the text of message 2"):
        template.encode([Message("user", "a"), Message("assistant", "<think>x</think>b", True)])


def test_a_template_that_looks_ahead_is_refused():
    """Mistral's later templates move the system text to the last question, where no earlier prompt has it."""
    source = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST]{% if loop.last or loop.index0 == "
        "messages | length - 3 %}{{ messages[0].content }}{% endif %}{{ m.content }}[/INST]{% else %}{{ m.content }}</s>"
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(TemplateError, match="template ahead: the prompt before an answer is not how"):
        ChatTemplate(tiny.KINDS["gpt2"](), source, "template ahead")


THINKER = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role == 'assistant' and loop.last -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{{- m.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


def test_what_a_template_writes_before_some_answers_is_told():
    """Qwen3 writes an empty thought before the last answer only. It is trained with that answer, and reported."""
    template = ChatTemplate(tiny.KINDS["gpt2"](), THINKER, "template thinker")
    messages = [
        Message("user", "a"),
        Message("assistant", "b", True),
        Message("user", "c"),
        Message("assistant", "d", True),
    ]
    encoded = template.encode(messages)
    said = [split_at_ends(template, encoded.ids, span) for span in spans(encoded.trained)]
    assert said == ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]
    assert template.written_before_answers == {"<think>\n\n</think>\n\n"}


def test_a_template_without_end_token_is_refused_even_where_line_ends_are_tokens():
    source = "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
    with pytest.raises(TemplateError, match="never learn to stop"):
        ChatTemplate(tiny.KINDS["newlines"](), source, "template plain")


def test_a_prompt_is_what_the_template_says_today_but_for_the_date():
    source = THINKER.replace("{%- for", "{{ strftime_now('%d %b %Y') }}{%- for", 1)
    template = ChatTemplate(tiny.KINDS["gpt2"](), source, "template dated")
    assert template.render([Message("user", "a")]).startswith("26 Jul 2024")


def test_a_tokenizer_without_template_names_the_choices():
    with pytest.raises(UserError, match=r"no chat template.*--template chatml\|gemma"):
        template_for(tiny.KINDS["gpt2"](), None, "some/model")


def test_a_template_whose_end_token_the_tokenizer_lacks_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(TemplateError, match="never learn to stop"):
        template_for(bare, "chatml")


@pytest.mark.parametrize("pair", LOSSLESS, ids="-".join)
@pytest.mark.parametrize(
    "answer",
    ["It is <|im_end|> or </s> or <｜end▁of▁sentence｜>.", " </s>  two\n</s>\nx", "<s>a</s> <|eot_id|>\n\n  code"],
)
def test_answers_with_typed_control_strings_are_proven_too_and_faults_in_them_found(pair, answer):
    """SentencePiece puts spaces after control tokens; those that the proof itself causes are not the answer's fault."""
    template = template_of(pair)
    messages = [Message("user", "Hi"), Message("assistant", answer, True)]
    encoded = template.encode(messages)
    assert not list(check(Conversation("typed", messages), encoded, template))
    encoded.trained[encoded.trained.index(True) - 1] = True  # a header's token
    assert "answer" in {kind for kind, _ in check(Conversation("typed", messages), encoded, template)}
