"""Prove a conversation's tokens and loss mask against transformers' own rendering and tokenising of it.

`check` knows nothing of how fastft.data.template.chat_template finds its boundaries. It compares the result with what
`apply_chat_template` gives: the prompts before trained answers and the whole conversation, id by id; the text of each
trained span with the answer, letter by letter; and the control tokens. fastft.data.tokenize checks every conversation
before its tokens are written, and `fastft inspect --check` checks a file.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from fastft.data.conversation import Conversation, Message
from fastft.data.template.chat_template import ChatTemplate, Encoded


def check(
    conversation: Conversation, encoded: Encoded, template: ChatTemplate, most: int | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (kind of fault, detail) for everything that is wrong with a conversation's tokens.

    Comparing the prompt of every answer takes time in the square of the number of rounds. With `most` (2 or more), only that
    number of answers is compared, evenly spread and including the first and the last. The whole conversation is always
    compared.
    """
    messages = conversation.messages
    spans = _spans(encoded.trained)
    answers = [i for i, m in enumerate(messages) if m.train and (m.ends or m.content.strip())]
    if len(spans) != len(answers):
        yield "number of answers", f"{len(answers)} answers to train, {len(spans)} trained spans"
        return
    chosen = list(zip(answers, spans))
    if most is not None and len(chosen) > most:
        chosen = [chosen[round(n * (len(chosen) - 1) / (most - 1))] for n in range(most)]
    for i, span in chosen:
        if messages[i].ends and encoded.ids[span[1] - 1] != template.end_of_turn_id:
            yield "end of turn", f"message {i + 1} does not end with {template.end_of_turn}"
        if not messages[i].ends and template.end_of_turn_id in encoded.ids[span[0] : span[1]]:
            yield "end of turn", f"message {i + 1} continues elsewhere, but {template.end_of_turn} is trained"
        text, expected = (
            _decoded(encoded.ids, span, template),
            _read_back(_trained_text(messages, i, template), template),
        )
        if text not in (expected, " " + expected):  # SentencePiece puts a space after a control token
            yield "answer", f"message {i + 1}: trained {text[:60]!r}, expected {expected[:60]!r}"
    typed = any(control in m.content for m in messages for control in template.control_tokens)
    if typed:  # transformers would make control tokens of such text, so only the decoded text can be compared
        yield from _check_text(messages, encoded, template)
    else:
        yield from _check_ids(messages, encoded, template, chosen)
    yield from _check_controls(messages, encoded, template)


def _trained_text(messages: list[Message], i: int, template: ChatTemplate) -> str:
    """Return the rendered text from the end of the prompt to the end of turn, or to the end of an unfinished answer."""
    rest = template.render(messages)[len(template.render(messages[:i], generation_prompt=True)) :]
    core = messages[i].content.strip()
    text_end = rest.index(core) + len(core)
    if not messages[i].ends:
        return rest[:text_end]
    return rest[: rest.index(template.end_of_turn, text_end) + len(template.end_of_turn)]


def _read_back(text: str, template: ChatTemplate) -> str:
    """Return the text after encoding and decoding, by which some tokenizers change it (NFC, unknown characters).

    Where control tokens are typed in it, the pieces between them are encoded one by one. Otherwise the tokenizer would make
    control tokens of what was typed, and SentencePiece would put spaces after these.
    """
    back = lambda piece: template.tokenizer.decode(  # noqa: E731
        template.tokenizer.encode(piece, add_special_tokens=False), skip_special_tokens=False
    )
    controls = sorted(filter(None, template.control_tokens), key=len, reverse=True)
    first, *rest = re.split(f"({'|'.join(map(re.escape, controls))})", text)
    if len(rest) <= 2:  # the end of turn alone, and nothing after it
        return back(text)
    # After a letter, SentencePiece keeps the first space of a text.
    pieces = (piece if piece in controls else back("x" + piece).removeprefix("x") for piece in (first, *rest))
    return "".join(pieces)


def _check_text(messages: list[Message], encoded: Encoded, template: ChatTemplate) -> Iterator[tuple[str, str]]:
    """Check that the tokens spell the conversation, whatever the tokenizer merges."""
    decode = lambda ids: template.tokenizer.decode(ids, skip_special_tokens=False)  # noqa: E731
    got, expected = decode(encoded.ids), decode(_library_ids(messages, template, generation_prompt=False))
    if "".join(got.split()) != "".join(expected.split()):  # control tokens may swallow white space next to them
        yield "whole", "the tokens do not spell the conversation"


def _check_ids(
    messages: list[Message],
    encoded: Encoded,
    template: ChatTemplate,
    answers_and_spans: list[tuple[int, tuple[int, int]]],
) -> Iterator[tuple[str, str]]:
    """Check that the whole and the prompts are transformers' own ids. Where a boundary was kept, prompts are compared alone."""
    if encoded.kept_boundaries == 0:
        if encoded.ids != _library_ids(messages, template, generation_prompt=False):
            yield "whole", "the ids are not the tokenizer's rendering of the conversation"
        for i, span in answers_and_spans:
            if encoded.ids[: span[0]] != _library_ids(messages[:i], template, generation_prompt=True):
                yield "prompt", f"the ids before message {i + 1} are not what a server would feed"
        return
    yield from _check_text(messages, encoded, template)
    for i, _ in answers_and_spans:
        # Only this answer is trained here, because a server's prompt merges tokens across the boundaries of earlier answers.
        alone = template.encode([replace(m, train=m.train and j == i) for j, m in enumerate(messages)])
        prompt = _library_ids(messages[:i], template, generation_prompt=True)
        if alone.ids[: alone.trained.index(True)] != prompt:
            yield "prompt", f"the ids before message {i + 1} are not what a server would feed"


def _check_controls(messages: list[Message], encoded: Encoded, template: ChatTemplate) -> Iterator[tuple[str, str]]:
    """Check that the control tokens are exactly those of the same conversation with a harmless text for every text."""
    control = {template.tokenizer.convert_tokens_to_ids(t) for t in template.control_tokens}
    control.discard(template.tokenizer.unk_token_id)  # text of unknown characters becomes this token, too
    harmless = [replace(m, content="x" if m.content.strip() else m.content) for m in messages]
    expected = [i for i in _library_ids(harmless, template, generation_prompt=False) if i in control]
    if [i for i in encoded.ids if i in control] != expected:
        yield "control tokens", "text became control tokens, or the template's own are missing"


def _library_ids(messages: list[Message], template: ChatTemplate, generation_prompt: bool) -> list[int]:
    turns = [{"role": m.role, "content": m.content} for m in messages]
    return template.tokenizer.apply_chat_template(
        turns,
        chat_template=template.dated_source,
        add_generation_prompt=generation_prompt,
        return_dict=False,
    )


def _spans(trained: list[bool]) -> list[tuple[int, int]]:
    """Return (begin, end) of every run of trained tokens."""
    edges = [i for i, (a, b) in enumerate(zip([False, *trained], [*trained, False])) if a != b]
    return list(zip(edges[::2], edges[1::2]))


def _decoded(ids: list[int], span: tuple[int, int], template: ChatTemplate) -> str:
    """Return the text of a span. It is decoded with the token before it, without which SentencePiece drops a first space."""
    decode = lambda tokens: template.tokenizer.decode(tokens, skip_special_tokens=False)  # noqa: E731
    return decode(ids[span[0] - 1 : span[1]])[len(decode(ids[span[0] - 1 : span[0]])) :]
