"""Split a long dialogue into parts of at most `max_tokens` tokens, at whole rounds, without losing any.

A round is a question with its answer. A part takes as many rounds as fit, in order, and begins with the system message.
Tokens are counted by a callable `count_tokens(messages)`. It tokenises the candidate part with the template that training
will use, because the number of tokens of a whole is not the sum over its pieces. Few candidates are counted, and none of
them is much longer than the limit. So splitting a dialogue of 10,000 turns costs as much as tokenising it a few times.

The trained rounds of a part may be preceded by context, which is not trained (`train` false):

- `overlap_rounds`: the last k rounds before it, or fewer where these would take more than half of the limit.
- A bare "continue" never begins a part, because what it asks for depends on the answer before it. The rounds back to the
  last real question come along as context. Where these do not fit, only that question and the end of the last answer come
  along. (Ending the previous part earlier would not be better: it would waste room at every such place, and would not help
  if the two rounds together exceed the limit.)

A round that is over the limit on its own is treated by `overlong`:

- "cut" (the default): its answer is cut into pieces, each a part of its own. A piece ends after a paragraph if its second
  half has such a place, else after a line outside of code, else after a line inside of code, else between words. A code
  fence that is cut is closed and opened again. All pieces but the last have `ends` false: their end of turn is not learned.
  The pieces after the first are asked for as people do: question and end of the answer so far as context, then "Continue".
  (Repeating the question alone would teach to begin answers in their middle.)
- "reject": the round is returned as OverLimit.

Cutting is the default because nothing is lost, and nothing wrong is learned: every token of a piece is what the model
should write after what precedes it.

A question that leaves less than an eighth of the limit for its answer is shortened first. Its beginning and its end stay,
because people write what they want before or after what they paste. `[…]` stands between them on a line of its own. The
question gets the room that its answer leaves, but at least half of the limit. The part that is left out is returned as
Shortened, so that it is recorded. Of 1,762 rounds of ShareGPT V3 this concerns 11 at 2,048 tokens and 79 at 512. Rejecting
these would lose 0.6 % and 4.5 % of what people asked, and a server could not show a model more of such a question either.
"""

import bisect
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fastft.data.continue_requests import is_continue
from fastft.data.conversation import Conversation, Message, rounds_of
from fastft.data.fenced_text import FencedText

CountTokens = Callable[[list[Message]], int]
BoundTokens = Callable[[list[Message]], int | None]
CheckPart = Callable[[list[Message]], None]

# The first guess at how much text fits. After the first count, the conversation's own ratio is used. A wrong guess costs a
# few more counts and changes no result.
CHARACTERS_PER_TOKEN = 3.0
SMALLEST_PIECE = 16  # characters; if fewer fit beside a question, it leaves no room for an answer

# How the pieces of a cut answer are asked for, in the script of the question.
_CONTINUE_REQUESTS = (
    (re.compile("[\u3040-\u30ff]"), "続けて"),
    (re.compile("[\u4e00-\u9fff]"), "继续"),
    (re.compile("[\uac00-\ud7af]"), "계속"),
    (re.compile("[\u0400-\u04ff]"), "Продолжай"),
    (re.compile("[\u0600-\u06ff]"), "أكمل"),
)


@dataclass(slots=True)
class OverLimit:
    """A round that no part can hold."""

    number: int  # of the round, from 1
    rounds: int  # how many the whole conversation has
    tokens: int  # of the round and the system message
    messages: list[Message]


@dataclass(slots=True)
class Shortened:
    """The middle of a question that was left out of its round."""

    number: int  # of the round, from 1
    rounds: int  # how many the whole conversation has
    characters: int  # of the whole question
    message: Message  # what was left out


# Parts, rounds that no part can hold, and what was left out of questions.
Cut = tuple[list[Conversation], list[OverLimit], list[Shortened]]


@functools.lru_cache(maxsize=1)
def token_counter(model: str, template: str | None) -> tuple[CountTokens, BoundTokens, CheckPart]:
    """Return (count, bound, check) for the tokenizer of `model` and its chat template, or the template `template`.

    `count` gives the number of tokens of messages. `bound` gives that number or a larger one, without looking at words, or
    None if it can prove nothing. `check` raises UserError for a part that the trainer would refuse. This is the only
    place where the cleaner needs the tokenizer, and so the only one that imports it. Raises UserError as `load_template`
    does.
    """
    from fastft.data.template.chat_template import load_template

    loaded = load_template(model, template)
    # Encoding once finds out what `check` does not: whether the tokenizer makes one token of each of its control tokens.
    loaded.encode([Message("user", "a"), Message("assistant", "b", train=True)])
    return loaded.count, loaded.token_bound, loaded.check


def split_conversation(
    conversation: Conversation,
    max_tokens: int,
    count_tokens: CountTokens,
    most_tokens: BoundTokens = lambda messages: None,
    *,
    overlap_rounds: int = 0,
    overlong: str = "cut",
) -> Cut:
    """Return (the parts of `conversation`, the rounds that no part can hold, what was left out of questions).

    `count_tokens` must not decrease when rounds are added. `most_tokens` returns an upper bound without counting, or None.
    Parts share the conversation's id and say which they are (`part`, `parts`). The parts of what is itself a part get an id
    of their own. Where a round is missing, a part ends, because an answer must not follow a question of another round.
    """
    splitter = _Splitter(
        conversation.messages, max_tokens, count_tokens, most_tokens, overlap_rounds, overlong == "cut"
    )
    parts, over = splitter.split()
    if len(parts) == 1:
        return [replace(conversation, messages=parts[0])], over, splitter.shortened
    id = conversation.id if conversation.parts == 1 else f"{conversation.id}-part-{conversation.part}"
    parts = [replace(conversation, id=id, messages=part, part=i, parts=len(parts)) for i, part in enumerate(parts)]
    return parts, over, splitter.shortened


class _Splitter:
    """Splits one dialogue."""

    def __init__(
        self,
        messages: list[Message],
        max_tokens: int,
        count_tokens: CountTokens,
        most_tokens: BoundTokens,
        overlap_rounds: int,
        may_cut: bool,
    ):
        self.system, self.rounds = rounds_of(messages)
        self.max_tokens, self.count, self.most = max_tokens, count_tokens, most_tokens
        self.overlap_rounds, self.may_cut = overlap_rounds, may_cut
        self.ends = list(itertools.accumulate(map(_characters, self.rounds)))  # characters up to the end of each round
        self.characters_per_token = CHARACTERS_PER_TOKEN
        self.whole_since = 0  # the first round after the latest cut or missing one; context may begin there
        self.shortened: list[Shortened] = []

    def split(self) -> tuple[list[list[Message]], list[OverLimit]]:
        """Return (the messages of each part, the rounds that no part can hold)."""
        parts, over = [], []
        start = 0
        while start < len(self.rounds):
            context = self._context(start)
            # A bare "continue" is not trained without the answer that it refers to, even if it fits.
            orphan = start > 0 and not context and is_continue(self.rounds[start][0].content)
            size = 0 if orphan else self._rounds_that_fit(start, context)
            if size:
                parts.append(_joined(self.system + context, self.rounds[start : start + size]))
                start += size
                continue
            pieces = self._pieces(start, context) if self.may_cut else []
            parts += pieces
            if not pieces:
                tokens = self.count(_joined(self.system, self.rounds[start : start + 1]))
                over.append(OverLimit(start + 1, len(self.rounds), tokens, self.rounds[start]))
            start += 1
            self.whole_since = start
        return parts, over

    def _rounds_that_fit(self, start: int, context: list[Message]) -> int:
        """Return how many rounds, from number `start` on, fit into one part after the system message and `context`."""
        head = self.system + context
        before = (self.ends[start - 1] if start else 0) - _characters(head)
        return _largest_fit(
            lambda n: self._fits(_joined(head, self.rounds[start : start + n])),
            guess=lambda: bisect.bisect_right(self.ends, before + self._characters_of(self.max_tokens)) - start,
            limit=len(self.rounds) - start,
        )

    def _fits(self, messages: list[Message], share: float = 1.0) -> bool:
        """Tell whether messages take at most `share` of the limit."""
        limit, characters = self.max_tokens * share, _characters(messages)
        # The bound saves counting: 2,633 of 5,848 conversations needed no count (benchmarks/clean_pass.py).
        if characters < limit and (most := self.most(messages)) is not None and most <= limit:
            return True
        tokens = self.count(messages)
        self.characters_per_token = max(characters, 1) / tokens
        return tokens <= limit

    def _characters_of(self, tokens: float) -> int:
        """Return about how many characters of this conversation correspond to a number of tokens."""
        return int(self.characters_per_token * tokens)

    # Context ---------------------------------------------------------------------------------------------------------

    def _context(self, start: int) -> list[Message]:
        """Return the rounds of context for the part that begins with round `start`; they fit together with that round."""
        this = self.rounds[start]
        for count in range(min(self.overlap_rounds, start - self.whole_since), 0, -1):
            context = _untrained(self.rounds[start - count : start])
            opens_bare = start > count and is_continue(context[0].content)
            if not opens_bare and self._fits(self.system + context, 0.5) and self._fits(self.system + context + this):
                return context
        if start == 0 or not is_continue(this[0].content):
            return []
        origin = self._origin(start)
        context = _untrained(self.rounds[origin:start])
        if origin >= self.whole_since and self._fits(self.system + context + this):
            return context
        return self._shortened(origin, start, lambda short: self._fits(self.system + short + this))

    def _origin(self, start: int) -> int:
        """Return the number of the last round before `start` whose question is not a bare "continue"; 0 if there is none."""
        before = range(start - 1, -1, -1)
        return next((n for n in before if not is_continue(self.rounds[n][0].content)), 0)

    def _shortened(self, origin: int, start: int, fits: Callable[[list[Message]], bool]) -> list[Message]:
        """Return the question of round `origin` and the end of the answer before round `start`, as much of both as fits."""
        answer = next((m.content for m in reversed(self.rounds[start - 1]) if m.role == "assistant"), "")
        return self._question_and_tail(self.rounds[origin][0], FencedText(answer), len(answer), fits)

    def _question_and_tail(
        self, question: Message, answer: FencedText, end: int, fits: Callable[[list[Message]], bool]
    ) -> list[Message]:
        """Return [question, `answer` up to `end`], untrained, and shortened until they fit; [] if they never do.

        The answer is shortened to its last characters (first as many as `max_tokens`, then fewer). If that is not enough,
        the question is shortened to its beginning.
        """
        question_size = len(question.content)
        while question_size:
            for tail_size in (self.max_tokens, self.max_tokens // 4, self.max_tokens // 16):
                tail = answer.piece(answer.tail(end, max(tail_size, 1)), end)
                context = [Message("user", question.content[:question_size]), Message("assistant", tail, ends=False)]
                if tail.strip() and fits(context):
                    return context
            question_size = min(question_size // 2, self.max_tokens)
        return []

    # A round that is over the limit ------------------------------------------------------------------------------------

    def _pieces(self, number: int, context: list[Message]) -> list[list[Message]]:
        """Return the parts into which the answer of round `number` is cut; [] if that cannot be done.

        Where the question leaves too little room it is shortened, and `self.shortened` records what was left out.
        """
        if [m.role for m in self.rounds[number]] != ["user", "assistant"]:
            return []
        question, answer = self.rounds[number]
        bare = number > 0 and is_continue(question.content)
        origin = self._origin(number)
        if bare and not context:
            context = self._shortened(origin, number, lambda short: self._fits([*self.system, *short, question], 0.5))
            if not context:  # then "continue" would have nothing to refer to
                return []
        head = [*self.system, *context, question]
        real_question = self.rounds[origin][0] if bare else question
        pieces = self._cut(head, real_question, answer) if self._fits(head, 7 / 8) else []
        if pieces or bare:
            return pieces
        short, left_out = self._short_question(question, answer)
        pieces = self._cut([*self.system, short], short, answer) if short else []
        if pieces:
            self.shortened.append(Shortened(number + 1, len(self.rounds), len(question.content), left_out))
        return pieces

    def _cut(self, head: list[Message], question: Message, answer: Message) -> list[list[Message]]:
        """Return a part for each piece of an answer to `question`, the first after `head`; [] if a piece does not fit."""
        text, parts, start = FencedText(answer.content), [], 0
        while start < len(text):
            end = self._piece_end(head, text, start)
            if end is None:
                return []
            # White space at the end of an answer should not become a piece of its own.
            only_space_is_left = end < len(text) and not text.text[end:].strip()
            if only_space_is_left and self._fits([*head, replace(answer, content=text.piece(start, len(text)))]):
                end = len(text)
            last = end == len(text)
            parts.append([*head, replace(answer, content=text.piece(start, end), ends=answer.ends and last)])
            start = end
            if not last:
                head = self._next_head(question, text, end)
                if not head:
                    return []
        return parts

    def _next_head(self, question: Message, text: FencedText, end: int) -> list[Message]:
        """Return what precedes the piece that begins at `end`: the question, the end of the answer so far, and "Continue".

        Returns [] if not even a short end of the answer fits.
        """
        request = Message("user", _continue_request(question.content))
        fits = lambda short: self._fits([*self.system, *short, request], 0.5)  # noqa: E731
        context = self._question_and_tail(question, text, end, fits)
        return [*self.system, *context, request] if context else []

    def _short_question(self, question: Message, answer: Message) -> tuple[Message | None, Message]:
        """Return (`question` without its middle, the middle), or (None, `question`) if even so an answer has no room."""
        text = FencedText(question.content)

        def fits(size: int, *answers: Message, share: float = 1.0) -> bool:
            short = replace(question, content=text.without_middle(size)[0])
            return self._fits([*self.system, short, *answers], share)

        sizes = range(0, len(text), max(self.max_tokens // 16, SMALLEST_PIECE))
        for share, answers in ((1.0, [answer]), (0.5, [])):
            beside = _characters([*self.system, *answers])
            count = _largest_fit(
                lambda n: n == 0 or fits(sizes[n], *answers, share=share),  # noqa: B023
                guess=lambda: (self._characters_of(self.max_tokens * share) - beside) // sizes.step,  # noqa: B023
                limit=len(sizes) - 1,
            )
            # Where a long answer would leave too little of the question, the question gets half of the limit instead, and
            # the answer is cut.
            if count and (not answers or not fits(sizes[count], share=0.5)):
                short, left_out = text.without_middle(sizes[count])
                return replace(question, content=short), replace(question, content=left_out)
        return None, question

    def _piece_end(self, head: list[Message], text: FencedText, start: int) -> int | None:
        """Return where the piece that begins at `start` ends: the best place among those that fit; None if none fits."""

        # Cached, because most of the places that are compared have been looked at by the search for the longest piece.
        @functools.cache
        def fits(end: int) -> bool:
            return self._fits([*head, Message("assistant", text.piece(start, end), True)])

        lines = text.line_ends(start)
        room = self.max_tokens - self.count(head)
        count = _largest_fit(
            lambda n: n == 0 or fits(lines[n - 1]),
            guess=lambda: bisect.bisect_right(lines, start + self._characters_of(room)),
            limit=len(lines),
        )
        if count and (lines[count - 1] - start >= SMALLEST_PIECE or count == len(lines)):
            for end in text.preferred(start, lines[:count]):
                if fits(end):  # must be checked: a shorter piece can take more tokens if it has a fence to close
                    return end
        # Not even one line fits. Cut between words if the second half of what fits has a space.
        stops = range(start + SMALLEST_PIECE, (lines[count] if count < len(lines) else len(text)), SMALLEST_PIECE)
        count = _largest_fit(
            lambda n: n == 0 or fits(stops[n - 1]),
            guess=lambda: self._characters_of(room) // SMALLEST_PIECE,
            limit=len(stops),
        )
        if not count:
            return None
        end = stops[count - 1]
        space = max(text.text.rfind(c, start + (end - start) // 2, end) for c in " \n")
        return space + 1 if space >= 0 and fits(space + 1) else end


def _continue_request(question: str) -> str:
    """Return the word for "continue" in a language that is written in the script of the question."""
    return next((text for script, text in _CONTINUE_REQUESTS if script.search(question)), "Continue")


def _untrained(rounds: Sequence[Sequence[Message]]) -> list[Message]:
    return [replace(message, train=False) for each in rounds for message in each]


def _characters(messages: Sequence[Message]) -> int:
    return sum(len(message.content) for message in messages)


def _largest_fit(fits: Callable[[int], bool], guess: Callable[[], int], limit: int) -> int:
    """Return the largest n in 0..limit for which `fits(n)` is true.

    `fits` is true for 0, and false for every n above the first for which it is false. `guess` gives the first n to try, and
    also the second, because the first count has improved it. From there on the search doubles its steps, or bisects if that
    is closer. With good guesses two or three counts are enough.
    """
    low, high = 0, limit + 1  # `low` fits, `high` does not
    candidate, step = guess(), 0
    while high - low > 1:
        candidate = min(max(candidate, low + 1), high - 1)
        fit = fits(candidate)
        low, high = (candidate, high) if fit else (low, candidate)
        middle = (low + high) // 2
        if not step:
            candidate, step = guess(), 1
        else:
            candidate = min(low + step, middle) if fit else max(high - step, middle)
            step *= 2
    return low


def _joined(system: list[Message], rounds: list[list[Message]]) -> list[Message]:
    return system + [message for each in rounds for message in each]
