"""A long dialogue to parts that fit the window: whole rounds, counted with the real template, none lost.

A round is a question with its answer. Parts take as many rounds as fit, in order; each begins with the system message.
The count comes from a callable `count_tokens(messages)`, which tokenises the candidate part with the template that
training will use: tokens of a whole are not the sum of its pieces. It is asked for few candidates, none of them much
longer than the window, so a dialogue of 10,000 turns costs a few times its own length.

Context (`train` false) may stand before the rounds that a part teaches:

- `overlap_rounds`: the last k rounds before it, fewer where they would take more than half of the window.
- A bare "continue" never opens a part: what it asks for depends on the answer before it. That round comes along as
  context (back to the last real question); where it does not fit, its question and the tail of its answer do. The border
  stays where it is: moved back, it would make the part before shorter, for every such border, and could not be moved at
  all where the two rounds together are over the window.

A round that is longer than the window on its own is, by `overlong`,

- "cut" (the default): its answer is cut into pieces, each a part of its own. A piece stops at a paragraph's end if its
  second half has one, else at a line's end outside of code, then inside, then between words; a code fence that it cuts
  is closed and opened again. All pieces but the last have `ends` false: their end of turn is not learned. The pieces
  after the first are asked for as people ask for them: question and tail of the answer so far as context, then
  "Continue". (Asking the question alone would teach to begin answers in their middle.)
- "reject": given back as OverWindow.

Cutting is the default because nothing is lost, and nothing wrong is learned: every token of a piece is what the model
should write behind what stands before it.

A question that leaves less than an eighth of the window for its answer is shortened before that: its beginning and its end
stay (people write what they want before or behind what they paste), with `[…]` on a line of its own between them. It keeps
what the answer leaves, at least half of the window. What is left out is given back as Shortened, so that it is on record.
Of 1,762 rounds of ShareGPT V3 this is 11 at 2,048 tokens and 79 at 512; to give them up would lose 0.6 % and 4.5 % of what
people asked, and no server can show a model more of such a question than its window.
"""

import bisect
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fastft.data.continue_requests import is_continue
from fastft.data.conversation import Conversation, Message, rounds_of

CountTokens = Callable[[list[Message]], int]
BoundTokens = Callable[[list[Message]], int | None]
CheckPart = Callable[[list[Message]], None]

# Where to look first for a border, until the conversation has shown its own. Too low or too high costs a few more counts,
# never a wrong border.
CHARACTERS_PER_TOKEN = 3.0
GAP = "\n\n[…]\n\n"  # where the middle of a question was
SMALLEST_PIECE = 16  # characters; a window that holds fewer beside the question holds no answer

# How the pieces of a cut answer are asked for: in the script of the question.
_ASK_ON = (
    (re.compile("[\u3040-\u30ff]"), "続けて"),
    (re.compile("[\u4e00-\u9fff]"), "继续"),
    (re.compile("[\uac00-\ud7af]"), "계속"),
    (re.compile("[\u0400-\u04ff]"), "Продолжай"),
    (re.compile("[\u0600-\u06ff]"), "أكمل"),
)


@dataclass(slots=True)
class OverWindow:
    """A round that no part can hold."""

    number: int  # from 1
    rounds: int  # in the whole conversation
    tokens: int  # with the system message
    messages: list[Message]


@dataclass(slots=True)
class Shortened:
    """The middle of a question, left out of its round."""

    number: int  # of the round, from 1
    rounds: int
    characters: int  # of the whole question
    message: Message  # what was left out


Cut = tuple[list[Conversation], list[OverWindow], list[Shortened]]


@functools.lru_cache(maxsize=1)
def token_counter(model: str, template: str | None) -> tuple[CountTokens, BoundTokens, CheckPart]:
    """(count, most, check) with the tokenizer of `model` and its chat template, or the named `template`.

    `most` is what `count` gives or more, without a look at words; None where nothing is proven. `check` is asked for
    what becomes a part: it raises UserError where the trainer would.

    The only place where the cleaner needs the tokenizer, so the only one that imports it. Raises UserError as
    `load_template` does.
    """
    from fastft.data.template.chat_template import load_template

    loaded = load_template(model, template)
    # What `check` does not see: whether the tokenizer makes one token of each of its control tokens.
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
    """The parts of `conversation`, each of at most `max_tokens` tokens, the rounds that no part can hold, and what was left
    out of questions.

    `count_tokens` must not fall when rounds are added; `most_tokens` gives as many or more without counting, or None.
    Parts share the id and say which they are (`part`, `parts`); a part that must be split again gets an id of its own. A
    part never reaches across a missing round: an answer would follow a question it does not belong to.
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
        self.ends = list(itertools.accumulate(map(_characters, self.rounds)))
        self.characters_per_token = CHARACTERS_PER_TOKEN
        self.whole_since = 0  # no round from here on was cut or is missing
        self.shortened: list[Shortened] = []

    def split(self) -> tuple[list[list[Message]], list[OverWindow]]:
        parts, over = [], []
        start = 0
        while start < len(self.rounds):
            context = self._context(start)
            # Without the answer that it goes on from, a bare "continue" is not taught even where it fits.
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
                over.append(OverWindow(start + 1, len(self.rounds), tokens, self.rounds[start]))
            start += 1
            self.whole_since = start
        return parts, over

    def _rounds_that_fit(self, start: int, context: list[Message]) -> int:
        head = self.system + context
        before = (self.ends[start - 1] if start else 0) - _characters(head)
        return _largest_fit(
            lambda n: self._fits(_joined(head, self.rounds[start : start + n])),
            guess=lambda: bisect.bisect_right(self.ends, before + self._characters_of(self.max_tokens)) - start,
            limit=len(self.rounds) - start,
        )

    def _fits(self, messages: list[Message], share: float = 1.0) -> bool:
        limit, characters = self.max_tokens * share, _characters(messages)
        # Of 5,848 conversations 2,633 needed no count (benchmarks/clean_pass.py).
        if characters < limit and (most := self.most(messages)) is not None and most <= limit:
            return True
        tokens = self.count(messages)
        self.characters_per_token = max(characters, 1) / tokens
        return tokens <= limit

    def _characters_of(self, tokens: float) -> int:
        """About as many characters are in `tokens` of this conversation."""
        return int(self.characters_per_token * tokens)

    # --- context -----------------------------------------------------------------------------------------------------

    def _context(self, start: int) -> list[Message]:
        """What stands, untrained, before the part that begins with round `start`. It fits together with that round."""
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
        """The last round before `start` that begins with a real question, else the first."""
        before = range(start - 1, -1, -1)
        return next((n for n in before if not is_continue(self.rounds[n][0].content)), 0)

    def _shortened(self, origin: int, start: int, fits: Callable[[list[Message]], bool]) -> list[Message]:
        """The question of round `origin` and the tail of the answer before round `start`, as much of both as fits."""
        answer = next((m.content for m in reversed(self.rounds[start - 1]) if m.role == "assistant"), "")
        return self._question_and_tail(self.rounds[origin][0], Fenced(answer), len(answer), fits)

    def _question_and_tail(
        self, question: Message, answer: "Fenced", end: int, fits: Callable[[list[Message]], bool]
    ) -> list[Message]:
        """[question, `answer` up to `end`], untrained and shortened until it fits; [] if nothing does.

        The answer keeps its end, `max_tokens` characters or less; then the question keeps its beginning.
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

    # --- a round over the window -------------------------------------------------------------------------------------

    def _pieces(self, number: int, context: list[Message]) -> list[list[Message]]:
        """The parts into which the answer of round `number` is cut; [] if that cannot be done."""
        this = self.rounds[number]
        if [m.role for m in this] != ["user", "assistant"]:
            return []
        question, answer = this
        bare = number > 0 and is_continue(question.content)
        origin = self.rounds[self._origin(number)][0] if bare else question
        if bare and not context:
            context = self._shortened(
                self._origin(number), number, lambda short: self._fits([*self.system, *short, question], 0.5)
            )
            if not context:  # nothing to go on from
                return []
        text, head = Fenced(answer.content), [*self.system, *context, question]
        if not self._fits(head, 7 / 8):
            short, left_out = (None, question) if bare else self._short_question(question, answer)
            if short is None:
                return []
            self.shortened.append(Shortened(number + 1, len(self.rounds), len(question.content), left_out))
            question = origin = short
            head = [*self.system, short]
        parts, start = [], 0
        while start < len(text):
            end = self._piece_end(head, text, start)
            if end is None:
                return []
            only_space_is_left = end < len(text) and not text.text[end:].strip()
            if only_space_is_left and self._fits([*head, replace(answer, content=text.piece(start, len(text)))]):
                end = len(text)  # no piece of white space alone
            last = end == len(text)
            message = replace(answer, content=text.piece(start, end), ends=answer.ends and last)
            parts.append([*head, message])
            start = end
            if not last:
                ask_on = Message("user", _ask_on(origin.content))
                head = self._question_and_tail(
                    origin, text, end, lambda short, ask=ask_on: self._fits([*self.system, *short, ask], 0.5)
                )
                if not head:
                    return []
                head = [*self.system, *head, ask_on]
        return parts

    def _short_question(self, question: Message, answer: Message) -> tuple[Message | None, Message]:
        """(`question` without its middle, the middle); None where not even its ends leave room for an answer."""
        text = Fenced(question.content)

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
            # Beside a long answer too little would be left of the question: that answer is cut.
            if count and (not answers or not fits(sizes[count], share=0.5)):
                short, left_out = text.without_middle(sizes[count])
                return replace(question, content=short), replace(question, content=left_out)
        return None, question

    def _piece_end(self, head: list[Message], text: "Fenced", start: int) -> int | None:
        """Where the piece that begins at `start` ends: the best border among those that fit; None if there is none."""

        @functools.cache  # the best border is one of those looked at in most cases
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
                if fits(end):  # a shorter piece with a fence to close may be longer than the longest without
                    return end
        # No line fits: one long line. Between words, if the second half of what fits has a space.
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


class Fenced:
    """A markdown text that can be cut anywhere: a code fence that a piece begins or ends in is opened and closed."""

    _FENCE = re.compile(r"^([ \t>]*)(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)

    def __init__(self, text: str):
        self.text = text
        self.borders, self.fences = [0], [None]  # from borders[i] on, the text is inside fences[i] (its opening line)
        for line in self._FENCE.finditer(text):
            indent, marks, rest = line.groups()
            fence = self.fences[-1]
            if fence is None and not (marks[0] == "`" and "`" in rest):
                self.borders.append(line.end() + 1)
                self.fences.append((indent, marks, line.group()))
            elif fence and marks[0] == fence[1][0] and len(marks) >= len(fence[1]) and not rest.strip():
                self.borders.append(line.end())
                self.fences.append(None)

    def __len__(self) -> int:
        return len(self.text)

    def fence_at(self, position: int) -> tuple[str, str, str] | None:
        """(indentation, marks, opening line) of the fence that a cut at `position` would be in."""
        return self.fences[bisect.bisect_right(self.borders, position) - 1]

    def around(self, start: int, end: int) -> tuple[str, str]:
        """What must stand before and behind text[start:end] to make it whole."""
        opened, left = self.fence_at(start), self.fence_at(end) if end < len(self.text) else None
        before = f"{opened[2]}\n" if opened and start else ""
        after = "" if left is None else f"{'' if self.text[end - 1] == chr(10) else chr(10)}{left[0]}{left[1]}"
        return before, after

    def piece(self, start: int, end: int) -> str:
        before, after = self.around(start, end)
        return f"{before}{self.text[start:end]}{after}"

    def tail(self, end: int, size: int) -> int:
        """Where the last `size` characters before `end` begin, at a line's beginning if there is one among them."""
        visible = len(self.text[:end].rstrip())
        start = max(visible - size, 0)
        line = self.text.find("\n", start, visible) + 1
        return line if start and line else start

    def without_middle(self, size: int) -> tuple[str, str]:
        """(at most `size` characters of the beginning and the end, with GAP between; what is left out).

        The beginning stops at a line's end where its second half has one, and the end starts at a line's beginning.
        """
        first = size - size // 2
        line = self.text.rfind("\n", first // 2, first) + 1
        stop = line or first
        start = max(self.tail(len(self.text), size // 2), stop) if size > 1 else len(self.text)
        return f"{self.piece(0, stop)}{GAP}{self.piece(start, len(self.text))}", self.text[stop:start]

    def line_ends(self, start: int) -> list[int]:
        """Behind each line end after `start`; the last is the end of the text."""
        found = [m.end() for m in re.compile(r"\n").finditer(self.text, start)]
        return found if found and found[-1] == len(self.text) else [*found, len(self.text)]

    def preferred(self, start: int, ends: Sequence[int]) -> Iterator[int]:
        """`ends`, the best first: the whole, then paragraphs, lines outside of code, others; the longest of each."""
        if ends[-1] == len(self.text):
            yield ends[-1]
        middle = start + (ends[-1] - start) // 2
        late = [end for end in reversed(ends) if end > middle and end < len(self.text)]
        outside = [end for end in late if self.fence_at(end) is None]
        yield from (end for end in outside if self.text.endswith("\n\n", 0, end) or self.text.startswith("\n", end))
        yield from outside
        yield from late
        yield from (end for end in reversed(ends) if end <= middle)


def _ask_on(question: str) -> str:
    return next((text for script, text in _ASK_ON if script.search(question)), "Continue")


def _untrained(rounds: Sequence[Sequence[Message]]) -> list[Message]:
    return [replace(message, train=False) for each in rounds for message in each]


def _characters(messages: Sequence[Message]) -> int:
    return sum(len(message.content) for message in messages)


def _largest_fit(fits: Callable[[int], bool], guess: Callable[[], int], limit: int) -> int:
    """The largest n of 0 … `limit` for which `fits(n)` (0 always does, and no n above one that does not).

    `guess` is asked again after the first look, which has shown more. From there on in steps that double, or by halves
    where that is nearer: good guesses take two or three looks.
    """
    low, high = 0, limit + 1  # fits, does not
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
