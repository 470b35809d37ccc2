"""Derive from a chat template what it writes around the texts of a conversation, and where the trained answers begin.

The template is rendered with a mark in the place of every text. This rendering, cut at the marks, is the skeleton: the
template's literals, the order of the texts, and for every trained answer the place where the prompt before it ends. That
place is not guessed: the prompt is rendered as a server would (with the generation prompt), and must be how the rendering
of the whole conversation begins. The first control token after every trained answer must be the end of turn.

A skeleton depends on the structure of a conversation alone: roles, which answers are trained, and the white space around
each text (templates trim texts, or do not). So it is derived once for each structure, and then filled with texts.

    tokens = learn_tokens(render, name, added_tokens)            # end of turn, separator, control tokens
    skeletons = Skeletons(render, name, tokens.end_of_turn, ControlNames(tokens.controls))
    text, boundaries = skeletons.of(messages).place(messages)    # the conversation, and where its answers begin

Control tokens are renamed in the literals before texts are put in, to strings that no text can spell (`ControlNames`).
Whatever does not hold raises TemplateError.
"""

import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tokenizers import AddedToken

from fastft.data.conversation import Message
from fastft.errors import UserError

Render = Callable[[Sequence[Message], bool], str]  # (messages, whether with the generation prompt) -> text

# Private noncharacters open and close every mark and every renamed control token.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARK = re.compile(f"{OPEN}(\\d+){CLOSE}")
BOUNDARY = f"{OPEN}boundary{CLOSE}"

# Of one conversation, so many answers have their prompt rendered and compared one by one. Each costs a rendering of
# everything before it, so that a dialogue of 10,000 turns would cost 5,000^2 / 2 turns. After these, a prompt is rendered
# only when the template's text before the answer differs from all that have been proven.
PROVE_EACH = 64
MOST_SKELETONS = 4096  # of one template; dialogues of many lengths would otherwise fill the memory


class TemplateError(UserError):
    """A template, or a conversation under it, for which the loss mask cannot be derived with certainty."""


# Control tokens ----------------------------------------------------------------------------------------------------------


class ControlNames:
    """Names for the control tokens that no text can spell: a random number between noncharacters."""

    def __init__(self, controls: Collection[str]):
        nonce = secrets.token_hex(8)  # token ids do not depend on it
        self.names = {control: f"{OPEN}{nonce}.{n}{CLOSE}" for n, control in enumerate(sorted(controls))}
        self.token = re.compile("|".join(re.escape(c) for c in sorted(controls, key=len, reverse=True)))
        self.name = re.compile(f"{OPEN}{nonce}\\.\\d+{CLOSE}")
        self._break = f"{OPEN}{nonce}{CLOSE}"

    def rename(self, text: str) -> str:
        """The text with every control token under its other name."""
        return self.token.sub(lambda found: self.names[found.group()], text)

    def break_up(self, text: str) -> str:
        """The text with a break after the first character of every control token, so that `rename` finds none."""
        return self.token.sub(lambda found: found.group()[0] + self._break + found.group()[1:], text)

    def mend(self, text: str) -> str:
        """Undo `break_up`."""
        return text.replace(self._break, "")


@dataclass(frozen=True)
class TemplateTokens:
    """What a template writes around an answer, and which of its strings are control tokens."""

    end_of_turn: str  # the token that ends an answer
    separator: str  # between the generation prompt and an answer, such as Vicuna's space
    controls: set[str]


def learn_tokens(render: Render, name: str, added: Mapping[str, AddedToken]) -> TemplateTokens:
    """Read the end of turn and the control tokens off the rendering of two rounds; `added` are the tokenizer's added tokens.

    Control tokens are those flagged special, the end of turn, and whatever else of the tokenizer's turn markers the
    template writes into a prompt. Raises TemplateError where a model could not learn to stop.
    """
    probe = [Message("user", "a"), Message("assistant", "b", True), Message("user", "c"), Message("assistant", "d")]
    prompt, whole = render(_marked(probe[:1]), True), render(_marked(probe), False)
    if not whole.startswith(prompt):
        raise TemplateError(f"{name}: {_not_a_prefix(prompt, whole)}")
    special = {content for content, token in added.items() if token.special}
    markers = [content for content in added if content in special or _looks_like_a_marker(content)]
    pattern = re.compile("|".join(re.escape(t) for t in sorted(markers, key=len, reverse=True)) or r"(?!)")
    answer = whole.find(_mark(1), len(prompt))
    ending = pattern.search(whole, answer) if answer >= 0 else None
    if ending is None:
        raise TemplateError(
            f"{name}: no special token of the tokenizer (it has: {', '.join(sorted(special)) or 'none'}) follows an answer, "
            "so the model could never learn to stop; choose another --template or add the token to the tokenizer"
        )
    controls = special | set(pattern.findall(prompt)) | {ending.group()}
    return TemplateTokens(ending.group(), whole[len(prompt) : answer], controls)


def _looks_like_a_marker(token: str) -> bool:
    r"""Whether an added token without the flag special can be a turn marker: "<|user|>" can, "\n\n" and "hello" cannot."""
    return len(token) > 2 and not any(c.isspace() or c.isalnum() for c in (token[0], token[-1]))


# Skeletons ---------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class AnswerPlace:
    """Where a trained answer begins in a skeleton: after `slots` texts, `offset` characters into the next literal."""

    message: int
    slots: int
    offset: int  # in the literal with its control tokens renamed


@dataclass(slots=True)
class Boundary:
    """Where a trained answer begins in a conversation's text."""

    at: int
    stop: int | None  # where training ends; None: with the end of turn


@dataclass(slots=True)
class Stretch:
    """What stands between two control tokens: literals, and numbers of texts, in order."""

    before: list[str | int]  # up to the boundary; all of it where there is none
    after: list[str | int] | None  # None where there is no boundary


@dataclass(slots=True)
class Skeleton:
    """What a template writes around n texts: literals[0] text literals[1] text ... literals[n]."""

    literals: list[str]  # control tokens under their own names
    renamed: list[str]  # the same with control tokens renamed
    slots: list[int]  # for each text, the number of the message that it is of
    answers: list[AnswerPlace]  # the trained ones, in order
    stretches: list[Stretch] | None  # None where two boundaries have no control token between them
    literal_bytes: int  # of the literals in UTF-8, without control tokens
    # How many control tokens there are at most, and pieces into which they and the boundaries cut the text: some tokenizers
    # put one more token before each piece.
    extra_tokens: int

    def texts(self, messages: Sequence[Message]) -> list[str]:
        """What fills the slots. The white space around a text is part of the literals, where the template keeps it."""
        return [_core(messages[slot].content) for slot in self.slots]

    def place(self, messages: Sequence[Message]) -> tuple[str, list[Boundary]]:
        """The conversation's text with control tokens renamed, and the boundary of each trained answer."""
        texts = self.texts(messages)
        starts, at = [], 0  # where each literal begins
        for literal, text in zip(self.renamed, [*texts, ""]):
            starts.append(at)
            at += len(literal) + len(text)
        boundaries = []
        for place in self.answers:
            at, answer = starts[place.slots] + place.offset, messages[place.message]
            if answer.ends:
                stop = None
            elif core := _core(answer.content):
                stop = starts[place.slots] + len(self.renamed[place.slots]) + len(core)
            else:
                stop = at
            boundaries.append(Boundary(at, stop))
        return _join(self.renamed, texts), boundaries

    def changed_message(self, messages: Sequence[Message], rendered: str) -> int | None:
        """The first message whose text is another in the template's own rendering; None where skeleton and texts are it."""
        texts = self.texts(messages)
        filled = _join(self.literals, texts)
        if filled == rendered:
            return None
        position = _first_difference(filled, rendered)
        at, changed = 0, self.slots[0] if self.slots else 0
        for literal, text, slot in zip(self.literals, texts, self.slots):
            if at + len(literal) > position:
                break
            at, changed = at + len(literal) + len(text), slot
        return changed


def with_texts(pieces: list[str | int], texts: list[str]) -> str:
    """A side of a `Stretch` with the texts in it."""
    return "".join([texts[piece] if piece.__class__ is int else piece for piece in pieces])


class Skeletons:
    """The skeletons of a template, each derived when a conversation of its structure comes for the first time."""

    def __init__(self, render: Render, name: str, end_of_turn: str, controls: ControlNames):
        """`name` says in messages which template it is."""
        self.render, self.name, self.end_of_turn, self.controls = render, name, end_of_turn, controls
        # What is more than white space and stands between the generation prompt and some answers. It is trained with them,
        # which is worth telling the user: Qwen3 writes an empty thought before the last answer only.
        self.written_before_answers: set[str] = set()
        self._derived: dict[tuple, Skeleton] = {}

    def of(self, messages: Sequence[Message]) -> Skeleton:
        """The skeleton of a conversation's structure. Raises TemplateError where it cannot be derived."""
        key = tuple((m.role, m.train, *_margins(m.content)) for m in messages)
        if key not in self._derived:
            if len(self._derived) >= MOST_SKELETONS:
                self._derived.clear()
            self._derived[key] = self._derive(messages)
        return self._derived[key]

    def _derive(self, messages: Sequence[Message]) -> Skeleton:
        marked = _marked(messages)
        whole = self.render(marked, False)
        pieces = MARK.split(whole)
        literals, slots = pieces[::2], list(map(int, pieces[1::2]))
        renamed = [self.controls.rename(literal) for literal in literals]
        answers = self._answers(messages, marked, whole, literals, slots)
        plain, controls = self.controls.name.subn("", "".join(renamed))
        return Skeleton(
            literals,
            renamed,
            slots,
            answers,
            stretches=self._stretches(renamed, answers),
            literal_bytes=len(plain.encode()),
            extra_tokens=2 * controls + 2 * len(answers) + 1,
        )

    def _answers(
        self, messages: Sequence[Message], marked: list[Message], whole: str, literals: list[str], slots: list[int]
    ) -> list[AnswerPlace]:
        """Where each trained answer begins: at the end of the prompt that a server would feed."""
        found: list[AnswerPlace] = []
        proven: dict[str, int] = {}  # literal before an answer -> where in it the answer begins
        for i, message in enumerate(messages):
            if not message.train:
                continue
            if i == 0:
                raise TemplateError(f"{self.name}: message 0 is an answer to no question")
            has_text = _core(message.content) != ""
            before = self._texts_before(i, slots, has_text)
            literal = literals[before]
            if len(found) < PROVE_EACH or literal not in proven:
                prompt = self.render(marked[:i], True)
                if not whole.startswith(prompt):
                    raise TemplateError(f"{self.name}: {_not_a_prefix(prompt, whole)} (message {i})")
                prompt_pieces = MARK.split(prompt)
                before, proven[literal] = len(prompt_pieces) // 2, len(prompt_pieces[-1])
            begin = proven[literal]
            found.append(AnswerPlace(i, before, len(self.controls.rename(literals[before][:begin]))))
            if literal[begin:].strip() and has_text:
                self.written_before_answers.add(literal[begin:])
            self._require_end_of_turn(i, literals[before + 1] if has_text else literals[before][begin:], has_text)
        return found

    def _texts_before(self, i: int, slots: list[int], has_text: bool) -> int:
        """How many texts the template writes before the answer in message `i`."""
        earlier = [slot for slot in slots if slot < i]
        before = len(earlier)
        if slots[:before] != earlier:
            raise TemplateError(f"{self.name}: the template puts the texts in another order than the messages")
        if has_text and slots[before : before + 1] != [i]:
            raise TemplateError(f"{self.name}: the template leaves out the answer in message {i}")
        return before

    def _require_end_of_turn(self, i: int, following: str, has_text: bool) -> None:
        """The first control token that follows the answer must be the end of turn, and only white space stand before it."""
        found = self.controls.token.search(following)
        if found is None or found.group() != self.end_of_turn or (has_text and following[: found.start()].strip()):
            raise TemplateError(f"{self.name}: {self.end_of_turn!r} does not follow the answer in message {i}")

    def _stretches(self, renamed: list[str], answers: list[AnswerPlace]) -> list[Stretch] | None:
        """The skeleton cut at its control tokens, and each stretch at its boundary."""
        marked = [*(literal + _mark(n) for n, literal in enumerate(renamed[:-1])), renamed[-1]]
        for answer in reversed(answers):
            literal = marked[answer.slots]
            marked[answer.slots] = literal[: answer.offset] + BOUNDARY + literal[answer.offset :]
        stretches = []
        for stretch in self.controls.name.split("".join(marked)):
            sides = [
                [int(p) if i % 2 else p for i, p in enumerate(MARK.split(side)) if p]
                for side in stretch.split(BOUNDARY)
            ]
            if len(sides) > 2:
                return None
            stretches.append(Stretch(sides[0], sides[1] if len(sides) == 2 else None))
        return stretches


# Texts and marks ---------------------------------------------------------------------------------------------------------


def _mark(i: int) -> str:
    return f"{OPEN}{i}{CLOSE}"


def _marked(messages: Iterable[Message]) -> list[Message]:
    """The messages with a mark for each text. The white space around it stays, so that what a template trims of it shows."""
    return [
        replace(m, content=_mark(i).join(_margins(m.content)) if _core(m.content) else m.content)
        for i, m in enumerate(messages)
    ]


def _core(text: str) -> str:
    return text.strip()


def _margins(text: str) -> tuple[str, str] | tuple[str]:
    """The white space before and after a text; one string where the text is nothing else."""
    core = _core(text)
    if core is text and text:
        return "", ""  # most texts have none
    if not core:
        return (text,)
    start = len(text) - len(text.lstrip())
    return text[:start], text[start + len(core) :]


def _join(literals: list[str], texts: list[str]) -> str:
    return "".join(piece for pair in zip(literals, [*texts, ""]) for piece in pair)


def _first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _not_a_prefix(prompt: str, whole: str) -> str:
    prompt, whole = MARK.sub("…", prompt), MARK.sub("…", whole)
    at = _first_difference(prompt, whole)
    return (
        "the prompt before an answer is not how the rendered conversation begins "
        f"(prompt has {prompt[at : at + 40]!r} where the conversation has {whole[at : at + 40]!r})"
    )
