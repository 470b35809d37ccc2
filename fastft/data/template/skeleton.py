"""Derive from a chat template what it writes around the texts of a conversation, and where the trained answers begin.

The template is rendered with a placeholder for every text. This rendering, cut at the placeholders, is the skeleton: the
template's literals, the order of the texts, and for every trained answer the place where the prompt before it ends. That
place is not guessed: the prompt is rendered as a server would do it (with the generation prompt), and the rendering of the
whole conversation must begin with it. The first control token after every trained answer must be the end of turn.

A skeleton depends on nothing but the structure of a conversation: roles, which answers are trained, and the white space
around each text (which a template may trim). So it is derived once for each structure, and then filled with texts.

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

# Noncharacters, which no text may contain, open and close every placeholder and every renamed control token.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
PLACEHOLDER = re.compile(f"{OPEN}(\\d+){CLOSE}")
BOUNDARY = f"{OPEN}boundary{CLOSE}"

# For the first N answers of a conversation, the prompt is rendered and compared each time. Each comparison renders
# everything before the answer, so a dialogue of 10,000 turns would cost 5,000^2 / 2 turns. For later answers, the prompt is
# rendered only if the literal before the answer is new: otherwise it is proven already where the answer begins in it.
PROVE_EACH = 64
MOST_SKELETONS = 4096  # that a template keeps; without a limit, dialogues of many lengths would fill the memory


class TemplateError(UserError):
    """A template, or a conversation under it, for which the loss mask cannot be derived with certainty."""


# Control tokens ----------------------------------------------------------------------------------------------------------


class ControlNames:
    """Other names for the control tokens, which no text can spell: a random number between noncharacters."""

    def __init__(self, controls: Collection[str]):
        nonce = secrets.token_hex(8)  # token ids do not depend on it
        self.names = {control: f"{OPEN}{nonce}.{n}{CLOSE}" for n, control in enumerate(sorted(controls))}
        self.token = re.compile("|".join(re.escape(c) for c in sorted(controls, key=len, reverse=True)))
        self.name = re.compile(f"{OPEN}{nonce}\\.\\d+{CLOSE}")
        self._break = f"{OPEN}{nonce}{CLOSE}"

    def rename(self, text: str) -> str:
        """Return the text with every control token under its other name."""
        return self.token.sub(lambda found: self.names[found.group()], text)

    def break_up(self, text: str) -> str:
        """Return the text with a break inside of every control token, so that `rename` finds none."""
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
    """Find the end of turn and the control tokens in a rendering of two rounds; `added` are the tokenizer's added tokens.

    Control tokens are the added tokens that are flagged special, the end of turn, and other turn markers among the added
    tokens that the template writes into a prompt. Raises TemplateError if a model could not learn to stop.
    """
    probe = [Message("user", "a"), Message("assistant", "b", True), Message("user", "c"), Message("assistant", "d")]
    prompt, whole = render(_with_placeholders(probe[:1]), True), render(_with_placeholders(probe), False)
    if not whole.startswith(prompt):
        raise TemplateError(f"{name}: {_not_a_prefix(prompt, whole)}")
    special = {content for content, token in added.items() if token.special}
    markers = [content for content in added if content in special or _looks_like_a_marker(content)]
    pattern = re.compile("|".join(re.escape(t) for t in sorted(markers, key=len, reverse=True)) or r"(?!)")
    answer = whole.find(_placeholder(1), len(prompt))
    ending = pattern.search(whole, answer) if answer >= 0 else None
    if ending is None:
        raise TemplateError(
            f"{name}: no special token of the tokenizer (it has: {', '.join(sorted(special)) or 'none'}) follows an answer, "
            "so the model could never learn to stop; choose another --template or add the token to the tokenizer"
        )
    controls = special | set(pattern.findall(prompt)) | {ending.group()}
    return TemplateTokens(ending.group(), whole[len(prompt) : answer], controls)


def _looks_like_a_marker(token: str) -> bool:
    r"""Tell whether an added token that is not special can be a turn marker: "<|user|>" can, "\n\n" and "hello" cannot."""
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
    """The position in a conversation's text at which a trained answer begins, and the end of its trained text."""

    at: int
    trained_to: int | None  # None: up to the end of turn, which is trained as well


@dataclass(slots=True)
class Stretch:
    """The text between two control tokens: literals, and the numbers of texts between them, in order."""

    before: list[str | int]  # what precedes the boundary; everything, if there is no boundary
    after: list[str | int] | None  # what follows the boundary; None, if there is no boundary


@dataclass(slots=True)
class Skeleton:
    """What a template writes around n texts: literals[0] text literals[1] text ... literals[n]."""

    literals: list[str]  # control tokens under their own names
    renamed: list[str]  # the same with control tokens renamed
    slots: list[int]  # for each text, the number of its message
    answers: list[AnswerPlace]  # of the trained answers, in order
    stretches: list[Stretch] | None  # None if two boundaries have no control token between them
    literal_bytes: int  # bytes of the literals in UTF-8, without control tokens
    # The most tokens that do not come from text: the control tokens, and one for each piece into which these and the
    # boundaries cut the text, because some tokenizers put a token before each piece.
    extra_tokens: int

    def texts(self, messages: Sequence[Message]) -> list[str]:
        """Return what fills the slots. If the template keeps the white space around a text, that is part of the literals."""
        return [_core(messages[slot].content) for slot in self.slots]

    def place(self, messages: Sequence[Message]) -> tuple[str, list[Boundary]]:
        """Return the conversation's text with control tokens renamed, and the boundary of each trained answer."""
        texts = self.texts(messages)
        starts, at = [], 0  # where each literal begins
        for literal, text in zip(self.renamed, [*texts, ""]):
            starts.append(at)
            at += len(literal) + len(text)
        boundaries = []
        for place in self.answers:
            at, answer = starts[place.slots] + place.offset, messages[place.message]
            if answer.ends:
                trained_to = None
            elif core := _core(answer.content):
                trained_to = starts[place.slots] + len(self.renamed[place.slots]) + len(core)
            else:
                trained_to = at
            boundaries.append(Boundary(at, trained_to))
        return _join(self.renamed, texts), boundaries

    def changed_message(self, messages: Sequence[Message], rendered: str) -> int | None:
        """Return the number of the first message whose text the template itself renders differently; None if there is none."""
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
    """Return one side of a `Stretch` with the texts in it."""
    return "".join([texts[piece] if piece.__class__ is int else piece for piece in pieces])


class Skeletons:
    """The skeletons of a template. Each is derived when a conversation first needs it."""

    def __init__(self, render: Render, name: str, end_of_turn: str, controls: ControlNames):
        """`name` says in messages which template it is."""
        self.render, self.name, self.end_of_turn, self.controls = render, name, end_of_turn, controls
        # Texts, except white space, that the template has put between the generation prompt and an answer. They are trained
        # with the answer, and the user is told so. Qwen3, for example, writes an empty thought before the last answer only.
        self.written_before_answers: set[str] = set()
        self._derived: dict[tuple, Skeleton] = {}

    def of(self, messages: Sequence[Message]) -> Skeleton:
        """Return the skeleton for a conversation's structure. Raises TemplateError if it cannot be derived."""
        key = tuple((m.role, m.train, *_margins(m.content)) for m in messages)
        if key not in self._derived:
            if len(self._derived) >= MOST_SKELETONS:
                self._derived.clear()
            self._derived[key] = self._derive(messages)
        return self._derived[key]

    def _derive(self, messages: Sequence[Message]) -> Skeleton:
        bare = _with_placeholders(messages)
        whole = self.render(bare, False)
        pieces = PLACEHOLDER.split(whole)
        literals, slots = pieces[::2], list(map(int, pieces[1::2]))
        renamed = [self.controls.rename(literal) for literal in literals]
        answers = self._answers(messages, bare, whole, literals, slots)
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
        self, messages: Sequence[Message], bare: list[Message], whole: str, literals: list[str], slots: list[int]
    ) -> list[AnswerPlace]:
        """Return where each trained answer begins, which is the end of the prompt that a server would feed."""
        found: list[AnswerPlace] = []
        proven: dict[str, int] = {}  # literal before an answer -> the position in it at which the answer begins
        for i, message in enumerate(messages):
            if not message.train:
                continue
            if i == 0:
                raise TemplateError(f"{self.name}: message 1 is an answer to no question")
            has_text = _core(message.content) != ""
            before = self._texts_before(i, slots, has_text)
            literal = literals[before]
            if len(found) < PROVE_EACH or literal not in proven:
                prompt = self.render(bare[:i], True)
                if not whole.startswith(prompt):
                    raise TemplateError(f"{self.name}: {_not_a_prefix(prompt, whole)} (message {i + 1})")
                prompt_pieces = PLACEHOLDER.split(prompt)
                before, proven[literal] = len(prompt_pieces) // 2, len(prompt_pieces[-1])
            begin = proven[literal]
            found.append(AnswerPlace(i, before, len(self.controls.rename(literals[before][:begin]))))
            if literal[begin:].strip() and has_text:
                self.written_before_answers.add(literal[begin:])
            self._require_end_of_turn(i, literals[before + 1] if has_text else literals[before][begin:], has_text)
        return found

    def _texts_before(self, i: int, slots: list[int], has_text: bool) -> int:
        """Return how many texts the template writes before the answer in message `i`."""
        earlier = [slot for slot in slots if slot < i]
        before = len(earlier)
        if slots[:before] != earlier:
            raise TemplateError(f"{self.name}: the template puts the texts in another order than the messages")
        if has_text and slots[before : before + 1] != [i]:
            raise TemplateError(f"{self.name}: the template leaves out the answer in message {i + 1}")
        return before

    def _require_end_of_turn(self, i: int, following: str, has_text: bool) -> None:
        """Raise TemplateError unless the end of turn is the first control token after the answer, with only space before it."""
        found = self.controls.token.search(following)
        if found is None or found.group() != self.end_of_turn or (has_text and following[: found.start()].strip()):
            raise TemplateError(f"{self.name}: {self.end_of_turn!r} does not follow the answer in message {i + 1}")

    def _stretches(self, renamed: list[str], answers: list[AnswerPlace]) -> list[Stretch] | None:
        """Return the skeleton cut at its control tokens, and each stretch between them cut at its boundary."""
        pieces = [*(literal + _placeholder(n) for n, literal in enumerate(renamed[:-1])), renamed[-1]]
        for answer in reversed(answers):
            piece = pieces[answer.slots]
            pieces[answer.slots] = piece[: answer.offset] + BOUNDARY + piece[answer.offset :]
        stretches = []
        for stretch in self.controls.name.split("".join(pieces)):
            sides = [
                [int(p) if i % 2 else p for i, p in enumerate(PLACEHOLDER.split(side)) if p]
                for side in stretch.split(BOUNDARY)
            ]
            if len(sides) > 2:
                return None
            stretches.append(Stretch(sides[0], sides[1] if len(sides) == 2 else None))
        return stretches


# Texts and placeholders ---------------------------------------------------------------------------------------------------


def _placeholder(i: int) -> str:
    return f"{OPEN}{i}{CLOSE}"


def _with_placeholders(messages: Iterable[Message]) -> list[Message]:
    """Return the messages with a placeholder in each text. The white space around texts stays, to see if it is trimmed."""
    return [
        replace(m, content=_placeholder(i).join(_margins(m.content)) if _core(m.content) else m.content)
        for i, m in enumerate(messages)
    ]


def _core(text: str) -> str:
    return text.strip()


def _margins(text: str) -> tuple[str, str] | tuple[str]:
    """Return the white space before and after a text, as two strings; if the text is only white space, as one."""
    core = _core(text)
    if core is text and text:
        return "", ""  # the case of most texts, made fast
    if not core:
        return (text,)
    start = len(text) - len(text.lstrip())
    return text[:start], text[start + len(core) :]


def _join(literals: list[str], texts: list[str]) -> str:
    return "".join(piece for pair in zip(literals, [*texts, ""]) for piece in pair)


def _first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _not_a_prefix(prompt: str, whole: str) -> str:
    prompt, whole = PLACEHOLDER.sub("…", prompt), PLACEHOLDER.sub("…", whole)
    at = _first_difference(prompt, whole)
    return (
        "the prompt before an answer is not how the rendered conversation begins "
        f"(prompt has {prompt[at : at + 40]!r} where the conversation has {whole[at : at + 40]!r})"
    )
