"""Conversation + tokenizer -> token ids and the mask of trained tokens, right by construction.

What is trained is what the model will be asked for. For every answer marked `train`:

- the prompt before it is tokenised exactly as a server will feed it (the chat template's own rendering with the
  generation prompt), and the answer begins a new token there: the boundary;
- trained are the separator that the template puts after its generation prompt (Vicuna's space), the answer, and the
  end-of-turn token; never headers, never padding. Of an answer that does not end there (`ends` false) only the separator
  and the text are trained: the end of turn stands in its place, and nobody learns it.

Everywhere else the ids equal the tokenizer's rendering of the whole conversation. Tokenising the whole string merges
across some boundaries (Qwen and GPT-2 make one token of "assistant\\n" + "\\nhello"'s newlines): there the boundary wins, and
`Encoded.merged_boundaries` counts it.

Text never becomes a control token. Texts are placed into the template's rendering only after the control tokens in it
have been renamed to strings that no text can spell, and a copy of the tokenizer knows the control tokens by those names
only. Nothing is guessed: the template is first rendered with a mark in the place of every text; its literals, prompts
and ends of turns are read off that skeleton; and the skeleton filled with the texts must equal the template's rendering
of the conversation, letter for letter: by comparison, or because the template provably does not look at texts
(fastft.data.template.jinja_proof). If anything does not hold, TemplateError says what. Nothing is masked in silence.

    template = load_template("path/or/name", None)       # the tokenizer's own template
    encoded = template.encode(conversation.messages)     # Encoded(ids, trained, merged_boundaries)
"""

import re
import secrets
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path

import tokenizers

from fastft.data.conversation import Message
from fastft.data.template.jinja_proof import leaves_texts_alone
from fastft.data.template.skeleton import (
    BOUNDARY,
    CLOSE,
    MARK,
    OPEN,
    TemplateError,
    _Answer,
    _Boundary,
    _core,
    _first_difference,
    _join,
    _margins,
    _mark,
    _marked,
    _message_at,
    _not_a_prefix,
    _repaired,
    _Skeleton,
    _Stretch,
    _with_texts,
)
from fastft.data.template.token_counter import counter_for
from fastft.data.template.tokenizer_json import (
    remove_prefix_space,
    rename_tokens,
    specification_of,
    tokenizer_of,
    tokens_per_byte,
)
from fastft.errors import UserError

# Answers of one conversation whose prompt is rendered and compared one by one. Each costs a rendering of everything
# before it, so a dialogue of 10,000 turns would cost 5,000^2 / 2 turns; behind this many, a prompt is rendered only when
# the template's text before the answer is not one that has been proven already.
PROVE_EACH = 64

BUILT_IN = Path(__file__).with_name("builtin")

# Some templates (Llama 3.1's) write today's date into the prompt. Tokens must not depend on the day on which a run is resumed.
FIXED_DATE = datetime(2024, 7, 26)


@dataclass(slots=True)
class Encoded:
    """A tokenised conversation of T tokens."""

    ids: list[int]  # T token ids
    trained: list[bool]  # T; True for tokens to learn
    merged_boundaries: int  # trained answers whose beginning the tokenizer would have merged with the prompt


class ChatTemplate:
    """A tokenizer together with the chat template it is used with."""

    def __init__(self, tokenizer, source: str, name: str):
        """`source` is the Jinja text, `name` says in messages which template it is. Raises TemplateError, UserError."""
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{name}: the tokenizer has no fast version (tokenizer.json); fastft needs its offsets")
        self.tokenizer, self.source, self.name = tokenizer, source, name
        self.dated_source = _with_fixed_date(source)
        self._leaves_texts_alone = leaves_texts_alone(self.dated_source)
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._added = {token.content: token for token in added.values()}
        self._controls = {content for content, token in self._added.items() if token.special}
        self._skeletons: dict[tuple, _Skeleton] = {}
        # More than white space that the template puts between its generation prompt and some answers, and that is trained
        # with them (Qwen3 writes an empty thought before the last answer only). Worth telling the user.
        self.written_before_answers: set[str] = set()
        self.end_of_turn = self._learn_end_of_turn()
        self.end_of_turn_id = tokenizer.backend_tokenizer.token_to_id(self.end_of_turn)
        self._rename()

    @property
    def control_tokens(self) -> set[str]:
        """Strings that become single tokens with a meaning of their own when the template writes them."""
        return self._controls

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids at which generation stops: the end of turn, and the end of text where it is another token."""
        ids = [self.end_of_turn_id, self.tokenizer.eos_token_id]
        return [i for n, i in enumerate(ids) if i is not None and i not in ids[:n]]

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """The template's own text of `messages`. Raises TemplateError when the template refuses them."""
        from jinja2 import TemplateError as JinjaError

        try:
            return self.tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in messages],
                chat_template=self.dated_source,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except (JinjaError, TypeError, IndexError, ValueError) as error:
            raise TemplateError(f"{self.name}: the template refuses the conversation: {error}") from None

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Token ids and trained mask of one conversation. Raises TemplateError."""
        return self.encode_many([messages])[0]

    def encode_many(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """`encode` for several conversations; the tokenizer works on them in parallel."""
        filled = [self._fill(_repaired(messages)) for messages in conversations]
        encodings = self._backend.encode_batch([text for text, _ in filled], add_special_tokens=False)
        return [self._mask(text, boundaries, encoding) for (text, boundaries), encoding in zip(filled, encodings)]

    def count(self, messages: Sequence[Message]) -> int:
        """How many ids `encode` gives, found by words where that is proven to be the same.

        That the template leaves the texts as they are is left to `check`. Raises TemplateError.
        """
        messages = _repaired(messages)
        counted = self._counted(messages) if self._counter else None
        return len(self.encode(messages).ids) if counted is None else counted

    def check(self, messages: Sequence[Message]) -> None:
        """Raises TemplateError for what `encode` refuses."""
        self._prove(_repaired(messages))

    def _counted(self, messages: list[Message]) -> int | None:
        """Control tokens stand for themselves and cut the text; so do boundaries, where the tokens do so anyway."""
        skeleton = self._skeleton(messages)
        if skeleton.stretches is None:
            return None
        texts = [_core(messages[slot].content) for slot in skeleton.slots]
        count = len(skeleton.stretches) - 1
        for i, stretch in enumerate(skeleton.stretches):
            text, boundary = _with_texts(stretch.before, texts), None
            if stretch.behind is not None:
                boundary = len(text)
                text += _with_texts(stretch.behind, texts)
            tokens = self._counter.count_again(text, i == 0, boundary) if text else 0
            if tokens is None:
                return None
            count += tokens
        return count

    def token_bound(self, messages: Sequence[Message]) -> int | None:
        """`encode` gives at most so many tokens; None where nothing is proven. Looks at no text's words.

        `encode` cuts the text at control tokens (one token each) and at the answers' boundaries, and tokenises every piece
        once. Of each byte of a piece it makes at most `tokens_per_byte`, and one more of what some tokenizers put before it.
        That the template leaves the texts as they are is left to `check`. Raises TemplateError.
        """
        if (most := self._tokens_per_byte) is None:
            return None
        messages = _repaired(messages)
        skeleton = self._skeleton(messages)
        texts = [_core(messages[slot].content) for slot in skeleton.slots]
        in_texts = sum(len(text) if text.isascii() else len(text.encode()) * most for text in texts)  # ASCII stays so
        return skeleton.tokens + skeleton.size * most + in_texts

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of `messages` and the generation prompt: what a server feeds the model, typed control strings kept text.

        The template sees the real texts (it may drop earlier thinking), but for a break inside typed control strings.
        """
        mark = f"{OPEN}{self._nonce}{CLOSE}"
        broken = [Message(m.role, self._broken(m.content, mark), m.train) for m in _repaired(messages)]
        text = self._rename_controls(self.render(broken, generation_prompt=True)).replace(mark, "")
        return self._original_ids(self._backend.encode(text, add_special_tokens=False).ids)

    def _broken(self, text: str, mark: str) -> str:
        return self._control_pattern.sub(lambda found: found.group()[0] + mark + found.group()[1:], text)

    # The template ----------------------------------------------------------------------------------------------------

    def _learn_end_of_turn(self) -> str:
        """The token that ends an answer; also counts the turn markers that are not flagged special as control tokens."""
        probe = [Message("user", "a"), Message("assistant", "b", True), Message("user", "c"), Message("assistant", "d")]
        prompt = self.render(_marked(probe[:1]), generation_prompt=True)
        whole = self.render(_marked(probe))
        if not whole.startswith(prompt):
            raise TemplateError(f"{self.name}: {_not_a_prefix(prompt, whole)}")
        markers = [t for t, token in self._added.items() if token.special or _looks_like_a_marker(t)]
        tokens = re.compile("|".join(re.escape(t) for t in sorted(markers, key=len, reverse=True)) or r"(?!)")
        answer = whole.find(_mark(1), len(prompt))
        ending = tokens.search(whole, answer) if answer >= 0 else None
        if answer < 0 or ending is None:
            known = ", ".join(sorted(self._controls)) or "none"
            raise TemplateError(
                f"{self.name}: no special token of the tokenizer (it has: {known}) follows an answer, so the model could "
                "never learn to stop; choose another --template or add the token to the tokenizer"
            )
        self._controls |= set(tokens.findall(prompt)) | {ending.group()}
        self.separator = whole[len(prompt) : answer]
        return ending.group()

    def _skeleton(self, messages: list[Message]) -> _Skeleton:
        """The skeleton of this conversation's structure: roles, trained answers, and each text's outer white space."""
        key = tuple((m.role, m.train, *_margins(m.content)) for m in messages)
        if key not in self._skeletons:
            if len(self._skeletons) >= 4096:  # long tails of structures would grow it without end
                self._skeletons.clear()
            self._skeletons[key] = self._derive(messages)
        return self._skeletons[key]

    def _derive(self, messages: list[Message]) -> _Skeleton:
        marked = _marked(messages)
        whole = self.render(marked)
        pieces = MARK.split(whole)
        skeleton = _Skeleton(
            pieces[::2], [self._rename_controls(p) for p in pieces[::2]], list(map(int, pieces[1::2])), []
        )
        proven: dict[str, int] = {}  # literal before an answer -> where in it the answer begins
        for i, message in enumerate(messages):
            if not message.train:
                continue
            if i == 0:
                raise TemplateError(f"{self.name}: message 0 is an answer to no question")
            slots = self._slots_before(i, messages, skeleton)
            literal = skeleton.literals[slots]
            if len(skeleton.answers) < PROVE_EACH or literal not in proven:
                prompt = self.render(marked[:i], generation_prompt=True)
                if not whole.startswith(prompt):
                    raise TemplateError(f"{self.name}: {_not_a_prefix(prompt, whole)} (message {i})")
                prompt_pieces = MARK.split(prompt)
                slots, proven[literal] = len(prompt_pieces) // 2, len(prompt_pieces[-1])
            offset = len(self._rename_controls(skeleton.literals[slots][: proven[literal]]))
            skeleton.answers.append(_Answer(i, slots, offset))
            if literal[proven[literal] :].strip() and _core(message.content):
                self.written_before_answers.add(literal[proven[literal] :])
            self._require_end_of_turn(i, skeleton, slots, proven[literal], _core(message.content) != "")
        skeleton.stretches = self._stretches(skeleton)
        written, controls = self._name_pattern.subn("", "".join(skeleton.renamed))
        skeleton.size, skeleton.tokens = len(written.encode()), 2 * controls + 2 * len(skeleton.answers) + 1
        return skeleton

    def _stretches(self, skeleton: _Skeleton) -> list[_Stretch] | None:
        """The skeleton cut at its control tokens, and each stretch at its boundary."""
        marked = [literal + _mark(n) for n, literal in enumerate(skeleton.renamed)]
        for answer in reversed(skeleton.answers):
            literal = marked[answer.slots]
            marked[answer.slots] = literal[: answer.offset] + BOUNDARY + literal[answer.offset :]
        stretches = []
        for stretch in self._name_pattern.split("".join(marked).removesuffix(_mark(len(skeleton.slots)))):
            sides = [
                [int(p) if i % 2 else p for i, p in enumerate(MARK.split(s)) if p] for s in stretch.split(BOUNDARY)
            ]
            if len(sides) > 2:
                return None
            stretches.append(_Stretch(sides[0], sides[1] if len(sides) == 2 else None))
        return stretches

    def _slots_before(self, i: int, messages: list[Message], skeleton: _Skeleton) -> int:
        """How many slots stand before message `i`."""
        before = sum(1 for slot in skeleton.slots if slot < i)
        if skeleton.slots[:before] != [slot for slot in skeleton.slots if slot < i]:
            raise TemplateError(f"{self.name}: the template puts the texts in another order than the messages")
        if _core(messages[i].content) and skeleton.slots[before : before + 1] != [i]:
            raise TemplateError(f"{self.name}: the template leaves out the answer in message {i}")
        return before

    def _require_end_of_turn(self, i: int, skeleton: _Skeleton, slots: int, offset: int, has_text: bool) -> None:
        """The first control token behind the answer must be the end of turn, with nothing but white space between."""
        literal = skeleton.literals[slots + 1] if has_text else skeleton.literals[slots][offset:]
        found = self._control_pattern.search(literal)
        if found is None or found.group() != self.end_of_turn or (has_text and literal[: found.start()].strip()):
            raise TemplateError(f"{self.name}: {self.end_of_turn!r} does not follow the answer in message {i}")

    def _fill(self, messages: list[Message]) -> tuple[str, list[_Boundary]]:
        """The conversation's text with control tokens renamed, and where in it each trained answer begins."""
        self._prove(messages)
        return self._placed(messages)

    def _prove(self, messages: list[Message]) -> None:
        """The skeleton with the texts in it is what the template makes of the conversation. Raises TemplateError.

        Rendered for each conversation, unless the template is proven to look at no text.
        """
        skeleton = self._skeleton(messages)
        if self._leaves_texts_alone:
            return
        texts = [_core(messages[slot].content) for slot in skeleton.slots]
        filled, rendered = _join(skeleton.literals, texts), self.render(messages)
        if filled != rendered:
            culprit = _message_at(_first_difference(filled, rendered), skeleton, texts)
            raise TemplateError(
                f"{self.name}: the template changes the text of message {culprit}; its tokens cannot be placed"
            )

    def _placed(self, messages: list[Message]) -> tuple[str, list[_Boundary]]:
        """`_fill` of messages whose texts the template leaves as they are."""
        skeleton = self._skeleton(messages)
        texts = [_core(messages[slot].content) for slot in skeleton.slots]
        starts, at = [], 0  # where each literal begins
        for literal, text in zip(skeleton.renamed, [*texts, ""]):
            starts.append(at)
            at += len(literal) + len(text)
        boundaries = []
        for a in skeleton.answers:
            at, answer = starts[a.slots] + a.offset, messages[a.message]
            if answer.ends:
                stop = None
            elif core := _core(answer.content):
                stop = starts[a.slots] + len(skeleton.renamed[a.slots]) + len(core)
            else:
                stop = at
            boundaries.append(_Boundary(at, stop))
        return _join(skeleton.renamed, texts), boundaries

    # The tokenizer ---------------------------------------------------------------------------------------------------

    def _rename(self) -> None:
        """Build the copy of the tokenizer that knows the control tokens under other names."""
        self._nonce = secrets.token_hex(8)  # no text can contain it; the ids do not depend on it
        self._names = {c: f"{OPEN}{self._nonce}.{n}{CLOSE}" for n, c in enumerate(sorted(self._controls))}
        self._control_pattern = re.compile("|".join(re.escape(c) for c in sorted(self._names, key=len, reverse=True)))
        self._name_pattern = re.compile(f"{OPEN}{self._nonce}\\.\\d+{CLOSE}")
        specification = specification_of(self.tokenizer.backend_tokenizer)
        rename_tokens(specification, self._names)
        self._backend = tokenizer_of(specification)
        self._tokens_per_byte = tokens_per_byte(specification)
        self._counter = counter_for(specification, self._backend)
        original = self.tokenizer.backend_tokenizer.token_to_id
        self._renamed_ids = {self._backend.token_to_id(name): original(c) for c, name in self._names.items()}
        self._ids_agree = all(renamed == kept for renamed, kept in self._renamed_ids.items())

    @cached_property
    def _continuation(self) -> tokenizers.Tokenizer:
        """The copy for texts that go on where another ended. Made when first needed (0.2 s): the cleaner hardly ever does."""
        specification = specification_of(self._backend)
        remove_prefix_space(specification)
        return tokenizer_of(specification)

    def _rename_controls(self, text: str) -> str:
        return self._control_pattern.sub(lambda found: self._names[found.group()], text)

    def _original_ids(self, ids: list[int]) -> list[int]:
        return ids if self._ids_agree else [self._renamed_ids.get(i, i) for i in ids]

    def _mask(self, text: str, boundaries: list[_Boundary], encoding: tokenizers.Encoding) -> Encoded:
        """Put the boundaries into the tokens of the whole text, and mark what lies between boundary and end of turn."""
        ids, offsets = encoding.ids, encoding.offsets
        starts = [start for start, _ in offsets]
        controls = [(found.start(), found.end()) for found in self._name_pattern.finditer(text)]
        control_tokens = [
            i for i, token in enumerate(ids) if token in self._renamed_ids and self._is_control(text, offsets[i])
        ]
        if len(controls) != len(control_tokens):
            raise TemplateError(f"{self.name}: the tokenizer does not make one token of each of its own control tokens")
        done, merged = 0, 0  # tokens of `ids` already taken over
        out_ids: list[int] = []
        trained: list[bool] = []
        for boundary in boundaries:
            at = boundary.at
            end = bisect_left(controls, (at, at))  # the answer's end of turn is the first control token behind it
            first = control_tokens[end - 1] if end else 0
            left_text = text[controls[end - 1][0] if end else 0 : at]
            left_ids = self._tokens(left_text)
            split = bisect_left(starts, at)
            out_ids += ids[done:first]
            out_ids += left_ids[max(done - first, 0) :]  # the last answer's end of turn stands before this prompt: once
            trained += [False] * (len(out_ids) - len(trained))
            if offsets[split - 1][1] <= at and ids[first:split] == left_ids:
                answer, answer_starts = ids[split : control_tokens[end] + 1], starts[split : control_tokens[end] + 1]
            else:
                merged += 1
                alone = self._continuation.encode(text[at : controls[end][1]], add_special_tokens=False)
                answer, answer_starts = alone.ids, [at + start for start, _ in alone.offsets]
            out_ids += answer
            trained += [boundary.stop is None or start < boundary.stop for start in answer_starts]
            done = control_tokens[end] + 1
        out_ids += ids[done:]
        trained += [False] * (len(out_ids) - len(trained))
        return Encoded(self._original_ids(out_ids), trained, merged)

    def _is_control(self, text: str, offset: tuple[int, int]) -> bool:
        """Whether a token is a control token there, and not (as the unknown token can be) what some text became."""
        return self._name_pattern.search(text, *offset) is not None

    @lru_cache(maxsize=1024)  # noqa: B019  headers repeat in every conversation; a template lives as long as the run
    def _tokens(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


def built_in_templates() -> list[str]:
    """Names that `--template` knows."""
    return sorted(p.name.removesuffix(".jinja") for p in BUILT_IN.iterdir() if p.name.endswith(".jinja"))


def load_tokenizer(model: str):
    """The tokenizer in a model directory (or of a Hub name). Raises UserError with one line; runs no remote code."""
    from transformers import AutoTokenizer

    path = Path(model)
    if path.is_dir() and not any(
        (path / f).exists() for f in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    ):
        raise UserError(f"{model}: the directory holds no tokenizer (tokenizer.json); save the model's tokenizer there")
    if not path.exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise UserError(f"{model}: no such directory")
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers raises a dozen kinds here
        raise UserError(f"{model}: its tokenizer cannot be loaded ({_first_line(error)})") from None


def load_template(model: str, template: str | None = None) -> ChatTemplate:
    """The chat template to use with `model`: its tokenizer's own, a built-in by name, or a `.jinja` file.

    Raises UserError (TemplateError) when there is none or its spans cannot be derived.
    """
    return chat_template(load_tokenizer(model), template, model)


def chat_template(tokenizer, template: str | None = None, model: str = "tokenizer") -> ChatTemplate:
    """`load_template` for a tokenizer that is loaded already; `model` names it in messages."""
    if template is None:
        source = tokenizer.chat_template
        if isinstance(source, dict):
            source = source.get("default")
        if not source:
            raise UserError(
                f"{model}: its tokenizer has no chat template; choose one: --template {'|'.join(built_in_templates())}"
            )
        return ChatTemplate(tokenizer, source, f"chat template of {model}")
    if template in built_in_templates():
        source = (BUILT_IN / f"{template}.jinja").read_text("utf-8")
        return ChatTemplate(tokenizer, source, f"template {template}")
    if Path(template).is_file():
        try:
            source = Path(template).read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"--template {template}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None
        return ChatTemplate(tokenizer, source, f"template {template}")
    raise UserError(f"--template {template}: neither a file nor one of {', '.join(built_in_templates())}")


def _with_fixed_date(source: str) -> str:
    """The template with a `strftime_now` of its own that knows the formats used in it, always of FIXED_DATE."""
    formats = sorted({found[2] for found in re.finditer(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", source)})
    cases = "".join(f"{{%- if format == {f!r} -%}}{FIXED_DATE.strftime(f)}{{%- endif -%}}" for f in formats)
    return f"{{%- macro strftime_now(format) -%}}{cases}{{%- endmacro -%}}{source}" if formats else source


def _looks_like_a_marker(token: str) -> bool:
    """Whether an added token that is not flagged special can be a turn marker: "<|user|>" can, "\n\n" and "hello" cannot."""
    return len(token) > 2 and not any(c.isspace() or c.isalnum() for c in (token[0], token[-1]))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
