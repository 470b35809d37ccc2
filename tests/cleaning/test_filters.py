"""The filters one by one: what each must find and must leave alone, in several languages, and the laws they all keep."""

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import orjson
import pytest
from helpers.cleaning_runs import clean_command
from hypothesis import given, settings
from hypothesis import strategies as st

from cleaning.filters import moderation, structure
from cleaning.filters.apply import apply_steps
from cleaning.filters.base import Repair
from cleaning.filters.chosen import check
from cleaning.filters.privacy import mask_text
from cleaning.filters.steps import MASKS, STEPS
from cleaning.pipeline import clean
from cleaning.settings import FilterSettings
from fastft.common.records import parse_json
from fastft.data.conversation import Conversation, Message, read_conversations
from fastft.data.language import detect_language

ALL_ON = FilterSettings(with_filters=tuple(step.name for step in STEPS if not step.default))


def talk(*turns: str, model: str = "") -> Conversation:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return Conversation("x", [Message(roles[i % 2], text, i % 2 == 1) for i, text in enumerate(turns)], model=model)


def texts(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.messages]


def reason(*turns: str, **chosen) -> str:
    return apply_steps(talk(*turns), FilterSettings(**chosen)).reason


def test_names_are_unique_and_described():
    names = [step.name for step in STEPS]
    assert len(names) == len(set(names))
    assert all(step.description for step in STEPS)


# --- rounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turns, kept, why",
    [
        (["a", "b", "c", "", "d", "e"], ["a", "b", "d", "e"], "empty_answer"),
        (["a", "\u200b", "d", "e"], ["d", "e"], "empty_answer"),
        (["a", "b", " ", "c"], ["a", "b"], "empty_turn"),
        (["a", "b", "c", "network error"], ["a", "b"], "error_banner"),
        # What only makes sense after the round that went goes with it.
        (["a", "b", "c", "network error", "try again", "d", "e", "f"], ["a", "b", "e", "f"], "error_banner"),
        (["continue", "… and so on", "继续。", "…", "q", "a"], ["q", "a"], "orphan_continue"),
        (["q", "a", "code?", "```python\nx = (\n", "thanks", "bye"], ["q", "a", "thanks", "bye"], "unfinished_answer"),
    ],
)
def test_only_the_bad_round_goes(turns, kept, why):
    conversation = talk(*turns)
    verdict = apply_steps(conversation, FilterSettings())
    assert not verdict.reason and texts(conversation) == kept
    assert verdict.repairs == {f"dropped_rounds:{why}": (len(turns) - len(kept)) // 2}
    assert [m.content for d in verdict.dropped for m in d.messages] == [t for t in turns if t not in kept]
    shared = [turns[i : i + 2] for i in range(0, len(turns), 2)]
    assert [[m.content for m in d.messages] for d in verdict.dropped] == [shared[d.number - 1] for d in verdict.dropped]


def test_a_banner_in_the_place_of_an_answer_takes_its_question_along():
    conversation = talk("hello", "hi")
    for role, text in [("user", "q"), ("user", "Too many requests in 1 hour. Try again later."), *[("user", "q")]]:
        conversation.messages.append(Message(role, text))
    conversation.messages.append(Message("assistant", "a", True))
    verdict = apply_steps(conversation, FilterSettings())
    assert texts(conversation) == ["hello", "hi", "q", "a"] and verdict.repairs == {"dropped_rounds:error_banner": 2}


def test_a_dialogue_without_a_good_round_is_rejected():
    assert reason("q", "", "q", " ") == "empty_answer"
    assert reason("q", "I'm sorry, but I cannot open links.") == "refusal"
    assert reason("continue", "a") == "orphan_continue"


def test_answers_in_a_row_are_merged_or_the_last_is_kept():
    for consecutive, expected in (("merge", "one\n\ntwo"), ("last", "two")):
        conversation = talk("q", "one")
        conversation.messages.append(Message("assistant", "two", True))
        assert apply_steps(conversation, FilterSettings(consecutive=consecutive)).repairs == {
            "merged_assistant_turns": 1
        }
        assert texts(conversation) == ["q", expected]


@pytest.mark.parametrize(
    "first, second, whole",
    [
        ("Use:\n```python\na = 1;\n", "```python\nb = 2\n```\nDone.", "Use:\n```python\na = 1;\nb = 2\n```\nDone."),
        ("```c\nint a;", "int b;\n```", "```c\nint a;\nint b;\n```"),
        ("1. one\n2. two", "3. three", "1. one\n2. two\n3. three"),
        ("Oak, beech,", "and lime are trees.", "Oak, beech, and lime are trees."),
        ("Twain said that Mark Tw", "ain was his name.", "Twain said that Mark Twain was his name."),
        ("The store and the", "store again, and the rest", "The store and the store again, and the rest"),
        ("我们需要认真考虑这个问题，也就是说，", "方案并不完美。", "我们需要认真考虑这个问题，也就是说，方案并不完美。"),
        # An answer that had ended; a second piece that begins anew; a cut that could be inside a word or not.
        ("All is said.", "Another thing is this.", None),
        ("It ends with", "Sure, here is the rest", None),
        ("He ran to the hou", "se of his father", None),
        ("```python\nx = some", "```python\nthing()\n```", None),
        ("```python\nx = 1\n", "Sure, here it is:\n```python\nx = 1\n```", None),
        ("3. three", "1. one", None),
        ("", "x", None),
    ],
)  # fmt: skip
def test_a_continued_answer_is_joined_where_it_was_cut(first, second, whole):
    assert structure.joined(first, second) == whole
    conversation = talk("q", first or "a", "continue", second)
    count = apply_steps(conversation, FilterSettings(without_filters=("unfinished_answer",))).repairs
    assert count["merged_continued_answers"] == (whole is not None)
    assert not whole or texts(conversation) == ["q", whole]


@pytest.mark.parametrize(
    "text, fence",
    [
        ("```\nx\n```", ""),
        ("```\nx", "```"),
        ("````\n```\n````", ""),
        ("```a\n```b\n", "```"),
        ("- ```py\n  x\n  ```", ""),
        ("~~~\n```\n~~~", ""),
        ("```x``` is inline", ""),
        ("say ``` in prose", ""),
    ],
)
def test_an_open_fence_is_recognised(text, fence):
    assert structure.open_fence(text) == fence


# --- refusals ---------------------------------------------------------------------------------------------------------

LONG = " ".join(f"In step {i} draw a line from {i * i} to {i + 7}." for i in range(60))

REFUSES = {
    "refusal": [
        "I'm sorry, but I cannot open links.",
        "I’m sorry, I am not able to play videos. Can I help with something else?",
        "Unfortunately, I don't have access to your files.",
        "Es tut mir leid, aber ich kann keine Bilder anzeigen.",
        "Lo siento, pero no puedo abrir enlaces.",
        "Je suis désolé, mais je ne peux pas ouvrir de liens.",
        "Desculpe, mas não consigo abrir links.",
        "很抱歉，我无法打开链接。",
        "申し訳ありませんが、リンクを開くことはできません。",
        "К сожалению, я не могу открывать ссылки.",
        "죄송하지만 링크를 열 수 없습니다.",
    ],
    "ai_boilerplate": [
        "As an AI language model, I have no opinions, but many people like tea. " + LONG,
        "Als KI-Sprachmodell habe ich keine Gefühle.",
        "Como modelo de lenguaje, no tengo preferencias.",
        "En tant que modèle de langage, je n'ai pas de goûts.",
        "Como uma inteligência artificial, não tenho sentimentos.",
        "作为一个人工智能语言模型，我没有感情。",
        "私はAI言語モデルですので、感情はありません。",
        "Как языковая модель, я не имею чувств.",
        "저는 인공지능 언어 모델이기 때문에 감정이 없습니다.",
    ],
    "self_identification": [
        "I am ChatGPT, a model made by OpenAI. How can I help?",
        "My name is Claude, I was made by Anthropic.",
        "Ich bin ChatGPT und wurde von OpenAI entwickelt.",
        "Soy ChatGPT, un modelo de OpenAI.",
        "Je suis ChatGPT, un modèle d'OpenAI.",
        "Eu sou o ChatGPT, da OpenAI.",
        "我是由OpenAI训练的语言模型。",
        "私はOpenAIによって開発されたモデルです。",
        "Я — ChatGPT, модель компании OpenAI.",
        "저는 OpenAI에서 개발한 언어 모델입니다.",
    ],
    "policy_refusal": [
        "I'm sorry, but I can't assist with that.",
        "I'm sorry, but I cannot help with illegal activities.",
        "Es tut mir leid, aber ich kann bei illegalen Dingen nicht helfen.",
        "很抱歉，我无法提供有害的信息。",
        "Lo siento, pero no puedo ayudar con actividades ilegales.",
    ],
}

NO_REFUSAL = [
    "A refusal often begins with “I'm sorry, but I cannot”, which is polite.",
    'The phrase "As an AI language model, I cannot" is a well-known opening.',
    "ChatGPT is a language model that OpenAI trained; as an AI language model, ChatGPT writes text.",
    "I'm sorry for the confusion. Here is the corrected code: `x = 1`.",
    "I'm sorry, I don't understand what you mean. Could you explain?",
    "I can't wait to see the result! Let us begin.",
    "I'm sorry, but I cannot plot it as an image; here is how to draw it by hand. " + LONG,
    "Dear Anna,\n\nI'm sorry, but I cannot come to your party on Friday.\n\nYours, Tom",
    "Es tut mir leid für das Missverständnis. Hier ist die richtige Lösung.",
    "抱歉造成了误解。下面是正确的代码。",
    "对不起，但您不能进行那个棋步。",
    "关于死后发生了什么，这是一个深刻的问题，我无法提供终极答案，但可以介绍几种看法。",
    "Der Satz „Als KI-Sprachmodell habe ich keine Meinung“ steht oft am Anfang.",
    "Извините за путаницу. Вот исправленный код.",
    "Как использовать модель? Сначала установите её.",
    "Paris.",
]


@pytest.mark.parametrize("why, text", [(why, text) for why, examples in REFUSES.items() for text in examples])
def test_refusals_cost_their_round_alone(why, text):
    assert reason("q", text, with_filters=("policy_refusal",)) == why
    conversation = talk("before", "yes", "q", text, "after", "yes")
    verdict = apply_steps(conversation, FilterSettings(with_filters=("policy_refusal",)))
    assert texts(conversation) == ["before", "yes", "after", "yes"] and verdict.repairs == {f"dropped_rounds:{why}": 1}


@pytest.mark.parametrize("text", [*NO_REFUSAL, *REFUSES["policy_refusal"]])
def test_ordinary_answers_are_no_refusals(text):
    assert not reason("q", text)


def test_a_question_may_say_anything():
    assert not reason("I'm sorry, but I cannot open it. As an AI language model, I am ChatGPT by OpenAI.", "What?")


# --- quality ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, why",
    [
        ("Well " + "and so on, and so " * 60, "repetition"),
        ("ha" * 300, "repetition"),
        ("A" * 80, "repetition"),
        ("答案是" + "我们需要考虑这个问题。" * 60, "repetition"),
        ("a line that is said\n" * 20 + "and then\n" + "another line again\n" * 300 + "The end.", "repetition"),
        ("Ã¤Ã¶Ã¼ sind Umlaute â€œsoâ€\x9d", "garbage"),
        ("\ufffd\ufffd\ufffd\ufffd\ufffd text", "garbage"),
        ("the number is " + "1234567890" * 7, "digit_run"),
    ],
)
def test_broken_text_is_rejected_by_name(answer, why):
    assert apply_steps(talk("q", answer), FilterSettings(with_filters=("digit_run",))).reason == why


@pytest.mark.parametrize(
    "answer",
    [
        "-" * 300 + "\n" + "=" * 200 + "\n| " + "--- | " * 90,
        "```\n" + "A" * 200 + "\n" + "0" * 100 + "\n```",
        "Name: " + "_" * 400,
        "".join(f"{i}. A different line about the number {i * i}.\n" for i in range(200)),
        "naïve café, São Paulo, Ærø, Åse, 你好，世界, Привет, 😀👍🏽",
        "no no no no, ha ha ha ha!",
        "pi is 3.14159265358979323846264338327950288419716939937510",
    ],
)
def test_good_text_passes(answer):
    assert not reason("q", answer)


@pytest.mark.parametrize(
    "text, found",
    [
        ("buy ACME Pills, now", True),
        ("acme pills", True),
        ("pacme pills", False),
        ("acme pillsbury", False),
        ("acme_pills acme pills_", False),
        ("我要买假药吗", True),
        ("STRASSE ist lang", True),
        ("C++ is old", True),
        ("nothing", False),
    ],
)
def test_blocked_phrases_are_found_as_whole_words(text, found):
    phrases = ("acme pills", "假药", "Straße", "c++", "acme")
    found_by = reason("q", text, blocked_phrases=phrases[:-1])
    assert (found_by == "blocked_phrase") == found
    assert reason(text, "a", blocked_phrases=phrases[:-1]) == found_by


# --- sessions, languages, limits --------------------------------------------------------------------------------------


def test_sessions_with_plugins_and_tools_are_rejected():
    assert apply_steps(talk("q", "a", model="Model: Plugins"), FilterSettings()).reason == "plugin_session"
    assert reason("q", "Used **Wolfram**\nIt is 4.") == "plugin_session"
    assert not reason("q", "Used **bold** text is loud.")
    tools = Conversation("x", [Message(r, "x") for r in ("user", "assistant", "tool", "assistant")])
    assert apply_steps(copy.deepcopy(tools), FilterSettings()).reason == "tool_session"
    assert not apply_steps(tools, FilterSettings(without_filters=("tool_session",))).reason and len(tools.messages) == 4


def test_what_a_record_says_of_its_session():
    said = {"plugin_session": "its 'plugins' are a list of 2"}
    assert apply_steps(talk("q", "a"), FilterSettings(), said).detail == said["plugin_session"]
    assert not apply_steps(talk("q", "a"), FilterSettings(without_filters=("plugin_session",)), said).reason


@pytest.mark.parametrize(
    "roles, left",
    [
        ("user assistant tool", "user assistant"),
        ("user assistant tool assistant user assistant tool user", "user assistant tool assistant user assistant"),
        ("user tool assistant", ""),  # a result that nobody asked for
        ("user assistant tool tool assistant", "user assistant tool tool assistant"),
    ],
)
def test_the_order_of_turns_with_tools(roles, left):
    conversation = Conversation("x", [Message(role, f"{i}") for i, role in enumerate(roles.split())])
    verdict = apply_steps(conversation, FilterSettings(without_filters=("tool_session",)))
    assert verdict.reason == ("" if left else "wrong_role_order")
    assert not left or [message.role for message in conversation.messages] == left.split()


SAMPLES = {
    "en": "How do I keep bread fresh for longer without putting it into the fridge?",
    "de": "Wie bleibt Brot länger frisch, ohne dass ich es in den Kühlschrank lege?",
    "es": "¿Cómo puedo conservar el pan fresco durante más tiempo sin nevera?",
    "fr": "Comment garder le pain frais plus longtemps sans le mettre au réfrigérateur ?",
    "pt": "Como posso manter o pão fresco por mais tempo sem o colocar na geladeira?",
    "zh": "怎样才能让面包在不放进冰箱的情况下保持更长时间的新鲜？",
    "ja": "パンを冷蔵庫に入れずに長く新鮮に保つにはどうすればよいですか。",
    "ko": "빵을 냉장고에 넣지 않고 더 오래 신선하게 보관하려면 어떻게 해야 하나요?",
    "ru": "Как дольше сохранить хлеб свежим, не убирая его в холодильник?",
    "he": "איך אפשר לשמור על לחם טרי לאורך זמן בלי להכניס אותו למקרר?",
    "unknown": "```python\nfor line in open(name):\n    print(line)\n```",
}


def test_languages_that_dumps_name_in_their_own_way():
    for lang, wanted in (("pt-br", "pt"), ("no", "nb"), ("nb", "no"), ("iw", "he"), ("zh-hant", "zh")):
        conversation = talk("q", "a")
        conversation.lang = lang
        assert not apply_steps(conversation, FilterSettings(languages=(wanted,))).reason
        assert apply_steps(conversation, FilterSettings(languages=("fr",))).reason == "other_language"


@pytest.mark.parametrize("code", ["", "```\n" + "for line in open(name): print(line)\n" * 50 + "```\n"])
@pytest.mark.parametrize(
    "pieces, language", [("en de de de en", "de"), ("en en de en en", "en"), ("de de de de", "de")]
)
def test_a_long_dialogue_is_in_the_language_of_most_of_it(pieces, language, code):
    answer = code.join(f"{SAMPLES[piece]}\n" * 6 for piece in pieces.split())
    assert 1_000 < len(answer) < 10_000 and detect_language(talk("?", answer)) == language


@pytest.mark.parametrize("code", SAMPLES)
def test_the_language_is_detected_and_selects(code):
    wrapped = talk(SAMPLES[code], "```python\nwhile True: the_code_is_english()  # and not counted\n```")
    assert detect_language(wrapped) == code
    for wanted in ("en", "zh"):
        stays = code in (wanted, "unknown")
        assert apply_steps(copy.deepcopy(wrapped), FilterSettings(languages=(wanted,))).reason == (
            "" if stays else "other_language"
        )
    verdict = apply_steps(wrapped, FilterSettings(with_filters=("unknown_language",)))
    assert wrapped.lang == code and verdict.reason == ("unknown_language" if code == "unknown" else "")


@pytest.mark.parametrize(
    "chosen, why",
    [
        ({"min_turns": 5}, "too_few_turns"),
        ({"min_turns": 4}, ""),
        ({"max_turns": 3}, "too_many_turns"),
        ({"max_chars": 12}, "too_long"),
        ({"max_chars": 13}, ""),
        ({"models": ("gpt-4",)}, ""),
        ({"models": ("gpt-3*", "gpt-4*")}, ""),
        ({"models": ("gpt-4-*",)}, "other_model"),
    ],
)
def test_limits_and_models_select_conversations(chosen, why):
    conversation = talk("one", "two", "three", "4?", model="Model: GPT-4")
    assert apply_steps(conversation, FilterSettings(**chosen)).reason == why


def test_no_model_is_no_match():
    assert reason("q", "a", models=("*",)) == "" and reason("q", "a", models=("gpt*",)) == "other_model"


# --- privacy ----------------------------------------------------------------------------------------------------------

# Made for this test; put together here so that nobody's scanner takes them for real ones.
SECRETS = {
    "aws": "AKIA" + "QWERTYUIOPASDFGH",
    "github": "ghp_" + "aZ9" * 12,
    "openai": "sk-" + "proj-" + "Qw8" * 12,
    "slack": "xoxb-" + "2345678901-" + "Zt7" * 6,
    "jwt": "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiI0MiIsIm4iOiJ4In0" + ".dGhpc2lzbm90YXNpZw",
    "google": "AIza" + "Sy7" * 11 + "Qw",
    "pem": "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEow" + "Qk7" * 20 + "\n-----END RSA PRIVATE KEY-----",
}


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize(
    "around", ['key = "{}"', "export TOKEN={}\n", "my key is {}.", "密钥是{}，请保密", "```\n{}\n```"]
)
def test_keys_are_masked(kind, around):
    mask = "[PRIVATE_KEY]" if kind == "pem" else "[KEY]"
    assert mask_text(around.format(SECRETS[kind])) == around.format(mask)


@pytest.mark.parametrize(
    "text, masked",
    [
        ("write to jane.doe+x@acme.io.", "write to [EMAIL]."),
        ("[a1@gmail.com](mailto:a1@gmail.com)", "[[EMAIL]](mailto:[EMAIL])"),
        ("邮件至a1@gmail.com请回复", "邮件至[EMAIL]请回复"),
        ("von Jörg.Müller@firma.de, o'neil@acme.ie, mail='a1@acme.io'", "von [EMAIL], [EMAIL], mail='[EMAIL]'"),
        ("api_key=0f8c2b1e9d7a4c5fb6e8a1d2c3f4b5a6", "api_key=[KEY]"),
        ('"secret-token": "Zq83hs0Fh2kd83jJs82h"', '"secret-token": "[KEY]"'),
        ("api_key = settings_of_the_first_environment, access_token=load2(request_of_the_user1)", None),
        ("email:joe@uni-köln.de joe@uni.de", "email:joe@uni-köln.de [EMAIL]"),
        ("jane@example.com, git@github.com:a/b.git, user@localhost", None),
        ("@decorator a@b pip install x@1.2", None),
        ("ping 93.184.216.34, not 192.168.1.10 or 127.0.0.1", "ping [IP], not 192.168.1.10 or 127.0.0.1"),
        ("http://93.184.216.34:8080/x", None),
        ("Chrome/113.0.0.0, version 1.22.3.41, 255.255.255.0, 1.2.3.4.5, 999.1.1.1", None),
        ("host 2001:4860:7860:1::8844 up", "host [IP] up"),
        ("a[::5] at 12:30:45, ::1, std::vector, fe80::1, 00:1a:2b:3c:4d:5e", None),
        ("call +49 30 1234567 or (613) 703-1834!", "call [PHONE] or [PHONE]!"),
        ("电话13719206018。", "电话[PHONE]。"),
        ("tel. 030/1234567", "tel. [PHONE]"),
        ("```\nphone = '613-703-1834'\n``` and `613-703-1834`", None),
        ("2023-04-01, 3.14159265, 1,234,567.89, 978-3-16-148410-0, 555-123-4567, order 12345678901", None),
        ("sk-learn, sk-your-key-goes-here-please-do, AKIAIOSFODNN7EXAMPLE", None),
    ],
)
def test_personal_data_is_masked_and_nothing_else(text, masked):
    assert mask_text(text) == (text if masked is None else masked)


@pytest.mark.parametrize(
    "answer, cut",
    [
        ("Half an answer that was\n\nnetwork error", True),
        ("Half an answer that was\n\n\nThere was an error generating a response\n", True),
        ("The page then shows:\n\nnetwork error", False),
        ("Check the cable, it may be a network error", False),
    ],
)
def test_an_answer_that_an_error_cut(answer, cut):
    assert reason("q", answer) == ("unfinished_answer" if cut else "")


def test_a_blocked_phrase_across_lines():
    assert reason("q", "buy  Acme\npills now", blocked_phrases=("acme pills",)) == "blocked_phrase"


def test_masks_are_counted_by_kind():
    conversation = talk(f"{SECRETS['aws']} a1@acme.io b2@acme.io", "call (613) 703-1834 or 93.184.216.34")
    counts = apply_steps(conversation, FilterSettings(with_filters=MASKS)).repairs
    assert counts == {"masked_keys": 1, "masked_emails": 2, "masked_phones": 1, "masked_ips": 1}
    assert texts(conversation) == ["[KEY] [EMAIL] [EMAIL]", "call [PHONE] or [IP]"]


# --- laws -------------------------------------------------------------------------------------------------------------

PIECES = [
    *(
        "I'm sorry, but I cannot ",
        "As an AI, I ",
        "```",
        "\n",
        "~~~",
        "continue",
        "1. ",
        "\ufffd",
        "network error",
        "我是",
    ),
    *("openai", "::1", "93.184.216.34", "a@b.io", "+49 30 1234567", "-----BEGIN PRIVATE KEY-----", "sk-" + "x8" * 12),
]
TEXT = st.text(max_size=20) | st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join)
MESSAGES = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), TEXT), max_size=8)


@settings(max_examples=300)
@given(MESSAGES, st.sampled_from(["merge", "last"]), st.sets(st.sampled_from([s.name for s in STEPS])))
def test_any_conversation_is_judged_and_nothing_is_lost(messages, consecutive, off):
    off -= {"too_short", "wrong_role_order"}
    chosen = FilterSettings(
        with_filters=tuple(n for n in ALL_ON.with_filters if n not in off),
        without_filters=tuple(off),
        consecutive=consecutive,
        languages=("en",),
        blocked_phrases=("openai",),
    )
    check(chosen)
    first, second = (Conversation("x", copy.deepcopy(messages)) for _ in range(2))
    verdict, again = apply_steps(first, chosen), apply_steps(second, chosen)
    assert (first, verdict) == (second, again)  # pure
    dropped = [name for name in verdict.repairs if name.startswith("dropped_rounds:")]
    assert sum(verdict.repairs[name] for name in dropped) == len(verdict.dropped)
    if verdict.reason:
        assert verdict.reason in {step.name for step in STEPS if not isinstance(step, Repair)} and verdict.detail
        return
    # Every turn as shared is kept, or in a dropped round, or counted by a repair.
    gone = sum(len(d.messages) for d in verdict.dropped)
    repaired = {"dropped_leading_assistant": 1, "merged_assistant_turns": 1, "trimmed_last_question": 1}
    repaired["merged_continued_answers"] = 2
    gone += sum(times * verdict.repairs[name] for name, times in repaired.items())
    assert len(first.messages) + gone == len(messages)


@given(TEXT)
def test_masking_twice_changes_nothing(text):
    once = mask_text(text)
    assert mask_text(once) == once


@given(TEXT, TEXT)
def test_joining_keeps_both_answers(first, second):
    whole = structure.joined(first, second)
    assert whole is None or (whole.startswith(first.rstrip()) and whole.endswith(second.strip("\n")[-1:]))


@given(st.lists(st.lists(TEXT, min_size=2, max_size=8), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_the_ledger_balances(tmp_path_factory, dialogues):
    directory = tmp_path_factory.mktemp("law")
    roles = ("human", "gpt")
    records = [{"conversations": [{"from": roles[i % 2], "value": t} for i, t in enumerate(d)]} for d in dialogues]
    (directory / "d.json").write_text(json.dumps(records))
    report = clean([directory / "d.json"], directory / "out", settings=ALL_ON)
    report.check()
    rejected = [parse_json(line) for line in (directory / "out/rejected.jsonl").open("rb")]
    rounds = [r for r in rejected if r["round"] is not None]
    assert len(rejected) - len(rounds) == sum(report.rejected.values()) == len(records) - report.kept
    for reason in {r["reason"] for r in rounds}:
        assert report.repairs[f"dropped_rounds:{reason}"] == sum(r["reason"] == reason for r in rounds)


@pytest.mark.parametrize(
    "question, answer",
    [
        ("用第一人称写一部小说的第一章，主角是名叫ChatGPT的机器人", "我是ChatGPT，世界上最先进的机器人。"),
        ("Write a short story from the perspective of ChatGPT.", "My name is ChatGPT, and I woke up at noon."),
        ("Schreib eine Geschichte in der Ich-Form über ein Programm", "Ich bin GPT-4, und mir ist langweilig."),
    ],
)
def test_somebodys_line_is_no_self_identification(question, answer):
    conversation = talk(question, answer, "continue", answer)
    assert not apply_steps(conversation, FilterSettings()).repairs and len(conversation.messages) == 4
    assert reason("Who are you?", answer) == reason("Tell me a story.", answer) == "self_identification"
    assert reason("你知道 ChatGPT 吗？", answer) == "self_identification"


def test_what_a_character_cannot_do_is_no_refusal():
    answer = "Sure. As a fictional pilot called Mo, I'm sorry, but I cannot open the door."
    assert not reason("Play a pilot", answer)
    assert reason("Play a pilot", "Sure. I'm sorry, but I cannot open links.") == "refusal"


# --- the command ------------------------------------------------------------------------------------------------------


def run(tmp_path, records, *arguments) -> int:
    (tmp_path / "d.json").write_text(json.dumps(records))
    return clean_command([str(tmp_path / "d.json"), "-o", str(tmp_path / "out"), *map(str, arguments)])


def record(*turns: str, id: str = "a") -> dict:
    roles = ("human", "gpt")
    return {"id": id, "conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)]}


def result(tmp_path) -> tuple[dict, list[list[str]]]:
    report = orjson.loads((tmp_path / "out/report.json").read_bytes())
    return report, [texts(c) for c in read_conversations(tmp_path / "out/conversations.jsonl")]


def test_options_reach_the_filters(tmp_path):
    records = [record("q", "I'm sorry, but I cannot open links.", "mail?", "a1@acme.io"), record("q", "9" * 70, id="b")]
    assert (
        run(tmp_path, records, "--keep_refusals", "--mask_pii", "--without", "repetition", "--with", "digit_run") == 0
    )
    report, kept = result(tmp_path)
    assert kept == [["q", "I'm sorry, but I cannot open links.", "mail?", "[EMAIL]"]]
    assert report["rejected"] == {"digit_run": 1} and report["repairs"] == {"masked_emails": 1}
    assert report["settings"]["with_filters"] == ["digit_run", *MASKS]
    assert "refusal" in report["settings"]["without_filters"]


def test_dropped_rounds_are_in_rejected(tmp_path):
    assert run(tmp_path, [record("q", "a", "q2", "", "q3", "a3")]) == 0
    report, kept = result(tmp_path)
    assert kept == [["q", "a", "q3", "a3"]] and report["repairs"] == {"dropped_rounds:empty_answer": 1}
    (line,) = (tmp_path / "out/rejected.jsonl").read_bytes().splitlines()
    rejected = orjson.loads(line)
    assert (rejected["reason"], rejected["round"], rejected["detail"]) == ("empty_answer", 2, "turn 4 is empty")
    assert [m["content"] for m in rejected["record"]["messages"]] == ["q2", ""]


def test_a_filter_of_ones_own_is_listed_and_applied(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    own = tmp_path / "my.py"
    own.write_text(
        'def too_polite(c):\n    """says thanks too often"""\n'
        '    n = sum(m.content.count("thank") for m in c.messages)\n'
        '    return f"{n} thanks" if n > 2 else None\n'
        "def broken(c):\n    return c.nothing\n"
        "def wrong(c):\n    return True\n"
    )
    records = [record("thanks thanks", "thanks", id="x"), record("q", "a")]
    assert run(tmp_path, records, "--filters", f"{own}:too_polite") == 0
    report, kept = result(tmp_path)
    assert report["rejected"] == {"too_polite": 1} and kept == [["q", "a"]]
    assert clean_command(["--list-filters", "--filters", f"{own}:too_polite"]) == 0
    shown = capsys.readouterr().out
    assert "too_polite" in shown and "says thanks too often" in shown
    for name, message in (("broken", "AttributeError"), ("wrong", "returned bool"), ("none", "no function none")):
        assert run(tmp_path, records, "--filters", f"{own}:{name}") == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_list_filters_shows_all_of_every_description(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # nothing is cut off, however narrow the terminal
    assert clean_command(["--list_filters"]) == 0
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line for line in shown.splitlines()}
    assert all(lines[step.name].endswith(step.description) for step in STEPS) and "--languages" in shown


def test_an_option_given_twice_adds(tmp_path):
    (tmp_path / "a.txt").write_text("purple\n")
    (tmp_path / "b.txt").write_text("orange\n")
    two = ["--blocked_phrases", tmp_path / "a.txt", "--blocked_phrases", tmp_path / "b.txt"]
    two += [
        "--without",
        "garbage",
        "--without",
        "repetition,refusal",
        "--with",
        "digit_run",
        "--with",
        "policy_refusal",
    ]
    two += ["--languages", "en", "--languages", "de", "--models", "gpt-4", "--models", "gpt-3*"]
    records = [record("q", word, id=word) | {"model": "gpt-4"} for word in ("purple", "orange", "green")]
    assert run(tmp_path, records, *two) == 0
    report, kept = result(tmp_path)
    assert kept == [["q", "green"]] and report["rejected"] == {"blocked_phrase": 2}
    chosen = {name: report["settings"][name] for name in ("without_filters", "with_filters", "languages", "models")}
    assert list(chosen.values()) == [
        ["garbage", "repetition", "refusal"],
        ["digit_run", "policy_refusal"],
        ["en", "de"],
        ["gpt-4", "gpt-3*"],
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--with", "nonsense"], "no filter is called 'nonsense'"),
        (["--without", "too_short"], "cannot be switched off"),
        (["--with", "refusal", "--without", "refusal"], "both switched on and off"),
        (["--languages", "English"], "not a language code; the nearest are en (English)\n"),
        (["--languages", "xx1"], "not a language code; the nearest are en (English), zh (Chinese), de (German)\n"),
        (["--languages", "klingon"], "not a language code"),
        (["--languages", "en,cn"], "'cn' is not a language code; the nearest are zh (Chinese)\n"),
        (["--languages", "pt-BR"], "the nearest are pt (Portuguese)\n"),
        (["--languages", "germn"], "de (German)"),
        (["--min_turns", "0"], "at least 1"),
        (["--filters", "nowhere.py:f"], "no such file"),
        (["--filters", "f"], "expected FILE.py:FUNCTION"),
        (["--moderation", "ftp://x"], "not an http(s) URL"),
        (["--moderation", "http://user:secret@x/v1"], "not into the URL"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(tmp_path, capsys, arguments, message):
    assert run(tmp_path, [record("q", "a")], *arguments) == 1
    error = capsys.readouterr().err
    assert message in error and "secret" not in error and not (tmp_path / "out").exists()


# --- moderation -------------------------------------------------------------------------------------------------------


class Endpoint:
    """A real server. It answers like OpenAI's, after the faults that it was told to have."""

    def __init__(self):
        self.faults, self.requests, self.headers = [], [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.headers.append(dict(self.headers))
                fault = outer.faults.pop(0) if outer.faults else None
                if fault == "timeout":
                    outer.slow.wait(5)
                    return
                if fault == "garbage":
                    return self.answer(200, b"<html>")
                if fault == "short":
                    return self.answer(200, b'{"results": []}')
                if fault:
                    return self.answer(fault, b"{}")
                outer.requests.append(body["input"])
                bad = ["kill" in text for text in body["input"]]
                results = [{"flagged": b, "categories": {"violence": b, "hate": False}} for b in bad]
                return self.answer(200, json.dumps({"results": results}).encode())

            def answer(self, code, data):
                self.send_response(code)
                for name, value in (("Location", outer.url), ("Retry-After", "0.01"), ("Content-Length", len(data))):
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.slow = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/moderations"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.slow.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(moderation, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(moderation, "TIMEOUT", 0.3)
    monkeypatch.setenv("OPENAI_API_KEY", "for-openai-alone")
    monkeypatch.delenv("FASTFT_MODERATION_KEY", raising=False)
    served = Endpoint()
    yield served
    served.close()


MODERATED = [
    record(f"question {i}", "kill" if i == 3 else "x" * 11_000 if i == 4 else "fine", id=str(i)) for i in range(40)
]


def test_moderation_rejects_and_survives_faults(tmp_path, endpoint, monkeypatch):
    monkeypatch.setenv("FASTFT_MODERATION_KEY", "key-of-this-test")
    endpoint.faults = [429, 500, "timeout", "garbage", 503]
    records = [r | {"id": r["id"]} for r in MODERATED if r["id"] != "4"] + [record("long", "word " * 3_000, id="long")]
    assert run(tmp_path, records, "--moderation", endpoint.url, "--without", "repetition") == 0
    report, kept = result(tmp_path)
    assert report["rejected"] == {"moderation": 1} and len(kept) == 39
    rejected = orjson.loads((tmp_path / "out/rejected.jsonl").read_bytes())
    assert (rejected["id"], rejected["detail"]) == ("3", "turn 2 is flagged: violence")
    asked = [text for request in endpoint.requests for text in request]
    assert len(asked) == len(set(asked)) and max(map(len, endpoint.requests)) == moderation.BATCH
    assert max(map(len, asked)) <= moderation.PIECE
    assert endpoint.headers[0]["Authorization"] == "Bearer key-of-this-test"
    for path in (tmp_path / "out").iterdir():
        assert b"key-of-this-test" not in path.read_bytes()
    assert b"question 5" not in (tmp_path / "out/moderation.sqlite").read_bytes()


def test_moderation_goes_on_where_it_was(tmp_path, endpoint, capsys):
    monkey = [None] * 1 + [500] * moderation.TRIES
    endpoint.faults = monkey
    assert run(tmp_path, MODERATED, "--moderation", endpoint.url, "--keep_refusals") == 1
    assert "failed 6 times, last: HTTP 500" in capsys.readouterr().err
    before = [text for request in endpoint.requests for text in request]
    assert len(before) == moderation.BATCH and not (tmp_path / "out/report.json").exists()
    assert run(tmp_path, MODERATED, "--moderation", endpoint.url, "--keep_refusals") == 0
    after = [text for request in endpoint.requests[1:] for text in request]
    assert not set(before) & set(after)
    assert run(tmp_path, MODERATED, "--moderation", endpoint.url, "--keep_refusals") == 0
    assert [t for r in endpoint.requests[1:] for t in r] == after  # nothing is asked twice


@pytest.mark.parametrize("fault", [401, 400, 307])
def test_moderation_that_cannot_work_stops_at_once(tmp_path, endpoint, capsys, fault):
    endpoint.faults = [fault]
    assert run(tmp_path, [record("q", "a")], "--moderation", endpoint.url) == 1
    assert f"HTTP {fault}" in capsys.readouterr().err and len(endpoint.headers) == 1
    assert "Authorization" not in endpoint.headers[0]  # OpenAI's key is for OpenAI


def test_a_moderation_endpoint_that_is_not_there_ends_the_run(tmp_path, endpoint, capsys):
    endpoint.close()
    assert run(tmp_path, [record("q", "a")], "--moderation", endpoint.url) == 1
    assert "failed 6 times" in capsys.readouterr().err


def test_the_reason_too_short_is_about_questions_and_answers_and_not_about_length():
    def reason(*turns: tuple[str, str]) -> str:
        return apply_steps(Conversation("a", [Message(role, text) for role, text in turns]), FilterSettings()).reason

    assert reason(("user", "a long question " * 500)) == reason() == "too_short"
    assert reason(("user", "q"), ("assistant", "a")) == ""
    (step,) = (step for step in STEPS if step.name == "too_short")
    assert step.description == "has no question or no answer, whatever its length"
