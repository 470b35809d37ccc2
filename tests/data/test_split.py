"""The splitter: parts of whole rounds, each within the limit, and no round lost."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cleaning.pipeline import clean
from fastft.data.continue_requests import is_continue
from fastft.data.conversation import Conversation, Message, read_conversations, rounds_of
from fastft.data.fenced_text import FencedText
from fastft.data.split import split_conversation
from fastft.errors import UserError


def by_words(messages: list[Message]) -> int:
    """Like a template: some tokens for each message, and merges that make the whole less than the sum of its pieces."""
    words = sum(len(m.content.split()) for m in messages)
    return 3 + 4 * len(messages) + words - len(messages) // 3


def by_characters(messages: list[Message]) -> int | None:
    """An upper bound of `by_words`."""
    return 3 + 4 * len(messages) + sum(len(m.content) for m in messages)


def dialogue(lengths: list[tuple[int, int]], system: int | None = None) -> Conversation:
    messages = [] if system is None else [Message("system", "s " * system)]
    for i, (question, answer) in enumerate(lengths):
        messages += [Message("user", f"q{i} " + "w " * question), Message("assistant", f"a{i} " + "w " * answer, True)]
    return Conversation("id", messages, source="f", model="m")


LENGTHS = st.integers(0, 60)


@given(
    st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=30), st.one_of(st.none(), LENGTHS), st.integers(1, 300)
)
def test_no_round_is_lost_and_every_part_fits(lengths, system, max_tokens):
    conversation = dialogue(lengths, system)
    parts, over, _ = split_conversation(conversation, max_tokens, by_words, overlong="reject")
    lead, rounds = rounds_of(conversation.messages)
    found = {each.number: each.messages for each in over}
    kept = iter([r for part in parts for r in rounds_of(part.messages)[1]])
    assert [found.get(i) or next(kept) for i in range(1, len(rounds) + 1)] == rounds
    assert next(kept, None) is None
    for i, part in enumerate(parts):
        assert by_words(part.messages) <= max_tokens
        assert part.messages[: len(lead)] == lead
        assert (part.id, part.source, part.model, part.part, part.parts) == ("id", "f", "m", i, len(parts))
    for each in over:
        assert by_words(lead + each.messages) == each.tokens > max_tokens


@given(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=30), st.integers(80, 300))
def test_parts_are_as_long_as_possible(lengths, max_tokens):
    conversation = dialogue(lengths)
    parts, over, _ = split_conversation(conversation, max_tokens, by_words, overlong="reject")
    missing = {each.number - 1 for each in over}
    _, rounds = rounds_of(conversation.messages)
    next_round = 0
    for part in parts:
        while next_round in missing:
            next_round += 1
        next_round += len(rounds_of(part.messages)[1])
        if next_round < len(rounds) and next_round not in missing:
            assert by_words(part.messages + rounds[next_round]) > max_tokens


def test_a_part_never_reaches_across_a_missing_round():
    parts, over, _ = split_conversation(dialogue([(1, 1), (500, 1), (1, 1)]), 100, by_words, overlong="reject")
    assert [p.messages[0].content.split()[0] for p in parts] == ["q0", "q2"]
    assert [(each.number, each.rounds) for each in over] == [(2, 3)]


def test_a_short_conversation_is_one_part():
    conversation = dialogue([(1, 1)])
    assert split_conversation(conversation, 1000, by_words) == ([conversation], [], [])


def test_a_very_long_dialogue_costs_a_few_times_its_length():
    conversation = dialogue([(i % 37, i % 53) for i in range(5_000)])
    counted = 0

    def count(messages: list[Message]) -> int:
        nonlocal counted
        counted += (tokens := by_words(messages))
        assert tokens <= 3 * 2048  # no candidate is much longer than the limit
        return tokens

    parts, over, _ = split_conversation(conversation, 2048, count)
    assert not over and len(parts) > 100
    assert counted < 12 * by_words(conversation.messages)


# Overlap and "continue" --------------------------------------------------------------------------------------------------


def trained_rounds(part: Conversation) -> list[list[Message]]:
    return [r for r in rounds_of(part.messages)[1] if any(m.train for m in r)]


# Written by hand, as people do; not derived from the pattern that is tested.
ASKING_ON = """continue|Continue.|please continue|Please continue!|go on|Go on please!|Keep going!|keep going please
    |ok continue|ok, continue|yes, continue|and continue|please go ahead|finish|carry on|proceed|resume|cont|contiune
    |next|More!|keep writing|continue writing please|please continue writing|continue generating
    |Please continue from where you left off|continue where you left off|continue from where you stopped
    |Continue from there|continue your answer|can you continue?|继续|请继续。|請繼續|请继续写|接着写|接着写下去
    |好的，继续|你继续|继续输出|weiter|bitte weiter|mach weiter|schreib weiter|fahre fort|Bitte fahre fort|sigue
    |continúa|continúa por favor|por favor continúa|prossiga|continuar|prosegui|vai avanti|continuez
    |continue s'il te plaît|continue, s’il te plaît|la suite|vas-y|продолжай|Продолжай, пожалуйста|дальше|продовжуй
    |続けて|続けてください|続きをお願いします|つづけて|계속|계속해줘|이어서 해줘|kontynuuj|devam et|lanjutkan|tiếp tục
    |أكمل|जारी रखें"""
ASKING_ON = [text.strip() for text in ASKING_ON.split("|")]
QUESTIONS = st.sampled_from(["q " * 5, "q " * 30]) | st.sampled_from(ASKING_ON)


@given(
    st.lists(st.tuples(QUESTIONS, st.integers(1, 60)), min_size=1, max_size=25),
    st.integers(0, 3),
    st.integers(20, 300),
    st.sampled_from(["cut", "reject"]),
)
def test_with_context_every_round_is_still_taught_once(lengths, overlap, max_tokens, overlong):
    messages = []
    for i, (question, answer) in enumerate(lengths):
        messages += [Message("user", question), Message("assistant", f"a{i}\n" + "w w w\n\n" * answer, True)]
    conversation = Conversation("id", messages)
    parts, over, short = split_conversation(
        conversation, max_tokens, by_words, overlap_rounds=overlap, overlong=overlong
    )
    bounded = split_conversation(
        conversation, max_tokens, by_words, by_characters, overlap_rounds=overlap, overlong=overlong
    )
    assert bounded == (parts, over, short)
    taught, unfinished = [], False
    for i, part in enumerate(parts):
        assert by_words(part.messages) <= max_tokens and (part.part, part.parts) == (i, len(parts))
        answers = [m for m in part.messages if m.train]
        assert part.messages[-1] is answers[-1] and all(m.role == "assistant" for m in answers)
        trained = [m.train for m in part.messages if m.role == "assistant"]
        assert trained == sorted(trained)  # context precedes what is taught, and is nowhere else
        bare = part.messages[0].content in ASKING_ON
        assert not bare or part.messages[0] is messages[0] or messages[0].content in ASKING_ON
        for answer in answers:
            taught[-1:] = [taught[-1] + answer.content] if unfinished else [*taught[-1:], answer.content]
            unfinished = not answer.ends
    missing = {each.number for each in over}
    assert taught == [m.content for i, m in enumerate(messages[1::2], start=1) if i not in missing]


def test_overlap_is_the_last_rounds_as_context():
    parts, _, _ = split_conversation(dialogue([(1, 3)] * 10), 64, by_words, overlap_rounds=2)
    assert [[m.content.split()[0] for m in p.messages if not m.train and m.role == "user"] for p in parts][1][:2] != []
    for before, part in zip(parts, parts[1:]):
        context = [r for r in rounds_of(part.messages)[1] if not any(m.train for m in r)]
        assert [[m.content for m in r] for r in context] == [
            [m.content for m in r] for r in rounds_of(before.messages)[1][-len(context) :]
        ]
        assert 1 <= len(context) <= 2


def test_a_bare_continue_brings_its_round_along():
    messages = []
    for question in ("Tell a story", "continue", "Continue please!", "Another", "go on"):
        messages += [Message("user", question), Message("assistant", "w " * 20, True)]
    parts, over, _ = split_conversation(Conversation("id", messages), 64, by_words)
    assert not over
    shown = [[(m.content, m.train) for m in p.messages if m.role == "user"] for p in parts]
    assert [[q for q, _ in part] for part in shown] == [
        ["Tell a story", "continue"],
        ["Tell a story", "Continue please!"],  # the story's question, and the end of the answer to continue
        ["Another", "go on"],
    ]
    assert [sum(m.train for m in p.messages) for p in parts] == [2, 1, 2]


@pytest.mark.parametrize("text", ASKING_ON)
def test_what_only_asks_for_the_rest(text):
    assert is_continue(text) and is_continue(f"  {text.upper() if text.isascii() else text}…\n")


@pytest.mark.parametrize(
    "text",
    "continue the story with a dragon|and then?||go|weiter unten steht was?|where are you|the answer|more cake|next week|"
    "finish the code with tests|continue with chapter two|Why go on?|继续讲第二章的故事|your answer|la suite de Fibonacci".split(
        "|"
    ),
)
def test_what_asks_for_more_than_the_rest(text):
    assert not is_continue(text)


# Cutting -----------------------------------------------------------------------------------------------------------------


def joined(pieces: list[str]) -> str:
    """An answer from its pieces: a fence with no line end after it was put there by the cut, and so was the next opening."""
    text = pieces[0]
    for piece in pieces[1:]:
        body, _, last = text.rpartition("\n")
        if last.strip(" \t>").strip("`~") == "" and last.strip():
            text, piece = body + "\n", piece.partition("\n")[2]
        text += piece
    return text


PARAGRAPHS = st.lists(
    st.sampled_from(
        ["one two three four five six\n", "\n", "a b c\n", "- item\n", "x = 1\n    y = 2\n", "# heading\n"]
    ),
    min_size=1,
    max_size=12,
).map("".join)
FENCED = st.builds(
    lambda indent, marks, info, body: "".join(
        f"{indent}{line}\n" for line in [f"{marks}{info}", *body.splitlines(), marks]
    ),
    st.sampled_from(["", "   "]), st.sampled_from(["```", "````", "~~~"]), st.sampled_from(["", "python"]), PARAGRAPHS,
)  # fmt: skip
ANSWERS = st.lists(st.one_of(PARAGRAPHS, FENCED), min_size=1, max_size=6).map("".join)


@given(ANSWERS, st.integers(40, 120))
def test_cut_pieces_joined_are_the_answer(answer, max_tokens):
    conversation = Conversation("id", [Message("user", "Question?"), Message("assistant", answer, True)])
    parts, over, _ = split_conversation(conversation, max_tokens, by_words)
    assert not over
    taught = [p.messages[-1] for p in parts]
    assert joined([m.content for m in taught]) == answer
    assert [m.ends for m in taught] == [False] * (len(taught) - 1) + [True]
    for i, part in enumerate(parts):
        assert by_words(part.messages) <= max_tokens
        assert [m.train for m in part.messages] == [False] * (len(part.messages) - 1) + [True]
        assert [m.role for m in part.messages] == ["user", "assistant"] * (2 if i else 1)
        if i:
            assert part.messages[0].content == "Question?" and part.messages[2].content == "Continue"
        fences = [line for line in part.messages[-1].content.splitlines() if line.strip()[:3] in ("```", "~~~")]
        assert len(fences) % 2 == 0  # what is opened is closed


@given(st.text(max_size=120), st.data())
def test_a_text_can_be_cut_anywhere(text, data):
    text = data.draw(st.sampled_from(["", "```py\ncode\n```\n", "~~~\n"])) + text
    fenced = FencedText(text)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(text) - 1, 1)), max_size=4)) - {len(text)})
    edges = [0, *cuts, len(text)] if text else [0, 0]
    whole = ""
    for a, b in zip(edges, edges[1:]):
        before, after = fenced.around(a, b) if b > a else ("", "")
        piece = fenced.piece(a, b) if b > a else ""
        assert piece.startswith(before) and piece.endswith(after)
        whole += piece[len(before) : len(piece) - len(after)]
    assert whole == text


def test_a_cut_prefers_paragraphs_to_lines_and_prose_to_code():
    prose = "word " * 20 + "\n"
    answer = prose + prose + "\n" + prose + "```py\n" + "code = 1\n" * 10 + "```\n" + prose * 3
    parts, _, _ = split_conversation(
        Conversation("id", [Message("user", "q"), Message("assistant", answer, True)]), 100, by_words
    )
    pieces = [p.messages[-1].content for p in parts]
    assert pieces[0] == prose + prose + "\n" and joined(pieces) == answer
    assert all(piece.count("```") % 2 == 0 for piece in pieces)


def test_one_long_line_and_one_long_word():
    for answer in ("word " * 400, "x" * 3000):
        count = lambda messages: sum(5 + len(m.content) // 4 for m in messages)  # noqa: E731
        parts, over, _ = split_conversation(
            Conversation("id", [Message("user", "q"), Message("assistant", answer, True)]), 128, count
        )
        assert not over and "".join(p.messages[-1].content for p in parts) == answer
        assert answer[0] == "x" or all(p.messages[-1].content.endswith(" ") for p in parts)


def test_a_question_that_leaves_no_room_is_shortened():
    parts, over, shortened = split_conversation(dialogue([(1, 1), (90, 30), (1, 1)]), 100, by_words)
    assert not over and len(parts) == 3 and [(each.number, each.rounds) for each in shortened] == [(2, 3)]
    question, answer = parts[1].messages
    first, last = question.content.split("\n\n[…]\n\n")
    assert first.startswith("q1 w w") and last.endswith("w ") and len(last) > 20
    assert first + shortened[0].message.content + last == "q1 " + "w " * 90
    assert answer.content == "a1 " + "w " * 30 and answer.train
    assert 80 < by_words(parts[1].messages) <= 100  # as much of the question as the answer leaves


def test_with_a_long_answer_the_question_gets_half_of_the_limit():
    parts, over, shortened = split_conversation(dialogue([(900, 300)]), 100, by_words)
    assert not over and len(shortened) == 1 and len(parts) > 4
    assert 35 < by_words(parts[0].messages[:1]) <= 50
    assert "".join(p.messages[-1].content for p in parts) == "a0 " + "w " * 300


def test_a_fence_around_the_gap_is_closed_and_opened():
    code = "Fix this:\n\n```python\n" + "x = 1\n" * 400 + "```\n\nIt does not run."
    messages = [Message("user", code), Message("assistant", "Like so.", True)]
    parts, _, shortened = split_conversation(Conversation("id", messages), 100, by_words)
    assert "x = 1\n```\n\n[…]\n\n```python\nx = 1\n" in parts[0].messages[0].content
    assert parts[0].messages[0].content.endswith("```\n\nIt does not run.") and "x = 1" in shortened[0].message.content


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60)), min_size=1, max_size=6),
    st.integers(64, 200),
    st.sampled_from(["w ", "w\n", "ww. w\n\n"]),
)
@example([(45, 7)], 64, "w ")  # the question leaves an eighth of the limit, but not the room for the smallest piece
def test_no_round_is_lost_for_a_long_question(lengths, max_tokens, unit):
    messages = []
    for i, (question, answer) in enumerate(lengths):
        messages += [Message("user", f"q{i} " + unit * question), Message("assistant", f"a{i} " + "w " * answer, True)]
    parts, over, shortened = split_conversation(Conversation("id", messages), max_tokens, by_words)
    assert not over
    assert all(by_words(part.messages) <= max_tokens for part in parts)
    taught = "".join(m.content for part in parts for m in part.messages if m.train)
    assert taught == "".join(m.content for m in messages if m.role == "assistant")
    middles = {each.number: each.message.content for each in shortened}
    for i, (question, _) in enumerate(lengths):
        shown = next(
            m.content for p in parts for m in p.messages if m.role == "user" and m.content.startswith(f"q{i} ")
        )
        if i + 1 in middles:
            shown = middles[i + 1].join(shown.split("\n\n[…]\n\n"))
        assert shown == f"q{i} " + unit * question


def test_a_round_that_cannot_be_cut_after_all_is_not_on_record_as_shortened():
    """The limit holds the question's ends and a first piece, but no context for the piece after it."""
    parts, over, shortened = split_conversation(dialogue([(60, 60)]), 32, by_words)
    assert [each.number for each in over] == [1] and not shortened and not parts


def test_rejecting_instead_of_cutting():
    parts, over, _ = split_conversation(dialogue([(1, 500), (1, 1)]), 100, by_words, overlong="reject")
    assert [each.number for each in over] == [1] and len(parts) == 1
    parts, over, _ = split_conversation(dialogue([(1, 500), (1, 1)]), 100, by_words)
    assert not over and len(parts) > 5


def test_the_real_template_counts(tmp_path):
    from helpers import tiny  # trains tokenizers: not for every test of this file

    from fastft.data.template.chat_template import load_template

    tiny.KINDS["byte_level"]().save_pretrained(tmp_path / "model")
    turns = [{"from": ("human", "gpt")[i % 2], "value": f"turn {i}: " + "hello world " * (i % 9)} for i in range(60)]
    (tmp_path / "dump.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    report = clean(
        [tmp_path / "dump.json"], tmp_path / "out", max_tokens=200, model=str(tmp_path / "model"), template="chatml"
    )
    parts = list(read_conversations(tmp_path / "out/conversations.jsonl"))
    template = load_template(str(tmp_path / "model"), "chatml")
    assert report.kept == 1 and report.parts == len(parts) > 3
    assert [m.content for p in parts for m in p.messages] == [t["value"] for t in turns]
    assert all(len(template.encode(p.messages).ids) <= 200 for p in parts)
    assert report.rounds == {"in": 30, "kept": 30, "rejected": 0, "shortened": 0}


def test_a_tokenizer_that_loses_its_control_tokens_is_known_at_the_start(tmp_path):
    from helpers import tiny

    directory = tmp_path / "model"
    tiny.sentencepiece().save_pretrained(directory)
    specification = json.loads((directory / "tokenizer.json").read_text())
    for token in specification["added_tokens"]:
        token["normalized"] = True
    (directory / "tokenizer.json").write_text(json.dumps(specification))
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    (tmp_path / "dump.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    with pytest.raises(UserError, match="does not make one token of each of its own control tokens"):
        clean([tmp_path / "dump.json"], tmp_path / "out", max_tokens=99, model=str(directory), template="chatml")


def test_a_conversation_that_the_template_refuses_is_a_ledger_line(tmp_path):
    """Vicuna's template knows no tool turns; the rest of the dump must not suffer."""
    import json

    from helpers import models

    from cleaning.pipeline import clean

    model = models.make_model(tmp_path / "model", template="vicuna")
    good = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    odd = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "</think> a"}]
    (tmp_path / "dump.json").write_text(
        json.dumps([{"id": "a", "conversations": good}, {"id": "b", "conversations": odd}])
    )
    refuses_thoughts = tmp_path / "odd.jinja"
    refuses_thoughts.write_text(
        "{% for m in messages %}{% if '</think>' in m.content %}{{ raise_exception('no thoughts') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    report = clean(
        [tmp_path / "dump.json"], tmp_path / "out", max_tokens=64, model=str(model), template=str(refuses_thoughts)
    )
    assert (report.kept, report.rejected) == (1, {"refused_by_template": 1})
    assert "no thoughts" in (tmp_path / "out" / "rejected.jsonl").read_text()
