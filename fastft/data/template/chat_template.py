"""Turn a conversation into token ids and the mask of trained tokens, right by construction.

The model is trained on exactly what it will be asked for. For every answer marked `train`:

- The prompt before it is tokenised exactly as a server will feed it (the chat template's own rendering with the
  generation prompt), and the answer begins a new token there: the boundary.
- Trained are the separator that the template puts after its generation prompt (Vicuna's space), the answer, and the
  end-of-turn token; never headers, never padding. An answer that does not end there (`ends` false) is followed by the
  end-of-turn token all the same, but only the separator and the text are trained.

Everywhere else the ids equal the tokenizer's rendering of the whole conversation. Tokenising the whole string would merge
tokens across some boundaries (Qwen and GPT-2 make one token of the line end of "assistant\\n" and the one at the beginning of
"\\nhello"). There the boundary is kept, and `Encoded.kept_boundaries` counts it.

Text never becomes a control token. Texts are placed into the template's rendering only after the control tokens in it
have been renamed to strings that no text can spell, and a copy of the tokenizer knows the control tokens by those names
only. Nothing is guessed: literals, prompts and ends of turns are taken from a rendering with a placeholder for every text
(fastft.data.template.skeleton). With the texts put in, it must equal the template's rendering of the conversation, letter
for letter. Either the two are compared, or the template is proven not to look at texts (fastft.data.template.jinja_proof).
If anything does not hold, TemplateError says what. Nothing is masked in silence.

    template = load_template("path/or/name", None)       # the tokenizer's own template
    encoded = template.encode(conversation.messages)     # Encoded(ids, trained, kept_boundaries)
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path

import jinja2
import tokenizers

from fastft.common.hub import require_found
from fastft.common.records import repair_text
from fastft.data.conversation import Message
from fastft.data.template.jinja_proof import leaves_texts_alone
from fastft.data.template.skeleton import (
    Boundary,
    ControlNames,
    Skeletons,
    TemplateError,
    learn_tokens,
    with_texts,
)
from fastft.data.template.token_counter import counter_for
from fastft.data.template.tokenizer_json import (
    remove_prefix_space,
    rename_tokens,
    specification_of,
    tokenizer_of,
    tokens_per_byte,
)
from fastft.errors import UserError, first_line, is_ours

BUILT_IN = Path(__file__).with_name("builtin")

# Some templates (Llama 3.1's) write today's date into the prompt. Tokens must not depend on the day on which a run is resumed.
FIXED_DATE = datetime(2024, 7, 26)

# Errors that a template's code can raise while rendering: Jinja's own, and Python's for its operations on values.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError,
)  # fmt: skip


@dataclass(slots=True)
class Encoded:
    """A tokenised conversation of T tokens."""

    ids: list[int]  # T token ids
    trained: list[bool]  # T; True for tokens to learn
    kept_boundaries: (
        int  # boundaries across which the tokenizer would have merged an answer's beginning with its prompt
    )


class ChatTemplate:
    """A tokenizer together with the chat template it is used with."""

    def __init__(self, tokenizer, source: str, name: str):
        """`source` is the template's Jinja text; errors call the template `name`. Raises TemplateError, UserError."""
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{name}: the tokenizer has no fast version (tokenizer.json); fastft needs its offsets")
        self.tokenizer, self.source, self.name = tokenizer, source, name
        self.dated_source = _with_fixed_date(source)
        self._leaves_texts_alone = leaves_texts_alone(self.dated_source)
        backend = tokenizer.backend_tokenizer
        added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        learned = learn_tokens(self.render, name, added)
        self.control_tokens = learned.controls  # strings that are single tokens where the template writes them
        self.separator = learned.separator  # what the template puts between its generation prompt and an answer
        self.end_of_turn = learned.end_of_turn
        self.end_of_turn_id = backend.token_to_id(self.end_of_turn)
        self._names = ControlNames(learned.controls)
        self._skeletons = Skeletons(self.render, name, self.end_of_turn, self._names)
        self._copy_tokenizer()

    def _copy_tokenizer(self) -> None:
        """Make the copy of the tokenizer that knows the control tokens under other names, and the counter of its tokens."""
        original = self.tokenizer.backend_tokenizer
        specification = specification_of(original)
        rename_tokens(specification, self._names.names)
        self._backend = tokenizer_of(specification)
        self._tokens_per_byte = tokens_per_byte(specification)
        self._counter = counter_for(specification, self._backend)
        names = self._names.names.items()
        self._original_id = {self._backend.token_to_id(name): original.token_to_id(token) for token, name in names}
        self._ids_agree = all(copied == own for copied, own in self._original_id.items())

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids at which generation stops: that of the end of turn, and that of the end of text where it is another token."""
        ids = [self.end_of_turn_id, self.tokenizer.eos_token_id]
        return [i for n, i in enumerate(ids) if i is not None and i not in ids[:n]]

    @property
    def written_before_answers(self) -> set[str]:
        """Texts that the template has put between its generation prompt and answers so far. They are trained with these."""
        return self._skeletons.written_before_answers

    # Text and tokens -------------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """Return the text that the template makes of `messages`. Raises TemplateError when the template refuses them."""
        try:
            return self.tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in messages],
                chat_template=self.dated_source,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except _TEMPLATE_ERRORS as error:
            raise TemplateError(
                f"{self.name}: the template refuses the conversation: {' '.join(str(error).split())}"
            ) from None

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Return the token ids and the loss mask of one conversation. Raises TemplateError."""
        return self.encode_many([messages])[0]

    def encode_many(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """Do what `encode` does for several conversations, on which the tokenizer works in parallel."""
        placed = []
        for messages in map(_repaired, conversations):
            self._prove(messages)
            placed.append(self._skeletons.of(messages).place(messages))
        encodings = self._backend.encode_batch([text for text, _ in placed], add_special_tokens=False)
        return [self._mask(text, boundaries, encoding) for (text, boundaries), encoding in zip(placed, encodings)]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of `messages` and the generation prompt, which is what a server feeds the model.

        A typed control token stays text. The template sees the real texts here, because it may drop earlier thoughts. Typed
        control tokens are hidden from it by a break inside each one.
        """
        broken = [Message(m.role, self._names.break_up(m.content), m.train) for m in _repaired(messages)]
        text = self._names.mend(self._names.rename(self.render(broken, generation_prompt=True)))
        return self._original_ids(self._backend.encode(text, add_special_tokens=False).ids)

    def check(self, messages: Sequence[Message]) -> None:
        """Raise TemplateError for a conversation that `encode` refuses because of the template's rendering."""
        self._prove(_repaired(messages))

    def _prove(self, messages: list[Message]) -> None:
        """Raise TemplateError unless the skeleton with the texts in it is what the template makes of the conversation.

        The conversation is rendered to find that out, unless the template is proven to look at no text.
        """
        skeleton = self._skeletons.of(messages)
        if self._leaves_texts_alone:
            return
        changed = skeleton.changed_message(messages, self.render(messages))
        if changed is not None:
            raise TemplateError(
                f"{self.name}: the template changes the text of message {changed + 1}; its tokens cannot be placed"
            )

    # Counting --------------------------------------------------------------------------------------------------------

    def count(self, messages: Sequence[Message]) -> int:
        """Return how many ids `encode` gives. They are counted by words if that is proven to give the same number. Call
        `check` to find out whether the template leaves the texts unchanged. Raises TemplateError.
        """
        messages = _repaired(messages)
        counted = self._counted(messages) if self._counter else None
        return len(self.encode(messages).ids) if counted is None else counted

    def _counted(self, messages: list[Message]) -> int | None:
        """Return the number of tokens, counted by words, stretch by stretch; None if that is not proven to be right.

        A control token is one token, and cuts the text into stretches. A boundary cuts a stretch if the tokenizer would cut
        there anyway.
        """
        skeleton = self._skeletons.of(messages)
        if skeleton.stretches is None:
            return None
        texts = skeleton.texts(messages)
        count = len(skeleton.stretches) - 1  # the control tokens between them
        for i, stretch in enumerate(skeleton.stretches):
            text, boundary = with_texts(stretch.before, texts), None
            if stretch.after is not None:
                boundary = len(text)
                text += with_texts(stretch.after, texts)
            tokens = self._counter.count_again(text, i == 0, boundary) if text else 0
            if tokens is None:
                return None
            count += tokens
        return count

    def token_bound(self, messages: Sequence[Message]) -> int | None:
        """Return a number of tokens that `encode` never exceeds, without looking at words; None if none is proven.

        `encode` cuts the text at control tokens (one token each) and at the answers' boundaries, and tokenises every piece
        once. A byte of a piece gives at most `tokens_per_byte` tokens. Some tokenizers put something before a piece, which
        gives one more. Call `check` to find out whether the template leaves the texts unchanged. Raises TemplateError.
        """
        if (most := self._tokens_per_byte) is None:
            return None
        messages = _repaired(messages)
        skeleton = self._skeletons.of(messages)
        # No normalizer changes ASCII, of which a byte therefore gives at most one token.
        in_texts = sum(len(t) if t.isascii() else len(t.encode()) * most for t in skeleton.texts(messages))
        return skeleton.extra_tokens + skeleton.literal_bytes * most + in_texts

    # The mask --------------------------------------------------------------------------------------------------------

    def _mask(self, text: str, boundaries: list[Boundary], encoding: tokenizers.Encoding) -> Encoded:
        """Put the boundaries into the tokens of the whole text, and mark the tokens from each boundary to the end of turn.
        Control tokens cut the text: the text between two of them is tokenised independently of the rest. So only the tokens
        from the last control token before a boundary up to the boundary are made anew, as those of the prompt alone.
        """
        # Taken once, because the tokenizer makes new lists for each access.
        ids, offsets = encoding.ids, encoding.offsets
        begins = [begin for begin, _ in offsets]
        controls, control_tokens = self._controls_in(text, ids, offsets)
        done, kept = 0, 0  # number of `ids` processed; number of boundaries that the tokenizer would have merged
        out_ids: list[int] = []
        trained: list[bool] = []
        for boundary in boundaries:
            at = boundary.at
            # Numbers among the control tokens: the answer's end of turn is the first one after the boundary.
            ending = bisect_left(controls, (at, at))
            last_control = control_tokens[ending - 1] if ending else 0  # its number among `ids`
            prompt_end = self._tokens(text[controls[ending - 1][0] if ending else 0 : at])
            split = bisect_left(begins, at)
            out_ids += ids[done:last_control]
            # Where the last control token is the end of turn of the answer before, it is in `out_ids` already.
            out_ids += prompt_end[max(done - last_control, 0) :]
            trained += [False] * (len(out_ids) - len(trained))
            if offsets[split - 1][1] <= at and ids[last_control:split] == prompt_end:
                answer = ids[split : control_tokens[ending] + 1]
                answer_begins = begins[split : control_tokens[ending] + 1]
            else:
                kept += 1
                alone = self._continuation.encode(text[at : controls[ending][1]], add_special_tokens=False)
                answer, answer_begins = alone.ids, [at + begin for begin, _ in alone.offsets]
            out_ids += answer
            trained += [boundary.trained_to is None or begin < boundary.trained_to for begin in answer_begins]
            done = control_tokens[ending] + 1
        out_ids += ids[done:]
        trained += [False] * (len(out_ids) - len(trained))
        return Encoded(self._original_ids(out_ids), trained, kept)

    def _controls_in(
        self, text: str, ids: list[int], offsets: list[tuple[int, int]]
    ) -> tuple[list[tuple[int, int]], list[int]]:
        """Return ([(beginning, end) of each control token in the text], [its number among the text's tokens])."""
        controls = [found.span() for found in self._names.name.finditer(text)]
        control_tokens = [
            i
            for i, token in enumerate(ids)
            # The position is compared, too, because text can become the unknown token, which some templates use as control
            # token.
            if token in self._original_id and self._names.name.search(text, *offsets[i])
        ]
        if len(controls) != len(control_tokens):
            raise TemplateError(f"{self.name}: the tokenizer does not make one token of each of its own control tokens")
        return controls, control_tokens

    @lru_cache(maxsize=1024)  # noqa: B019  headers repeat in every conversation; a template lives as long as the run
    def _tokens(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    @cached_property
    def _continuation(self) -> tokenizers.Tokenizer:
        """A copy of the tokenizer for texts that continue another. It takes 0.2 s, so it is made when it is first needed."""
        specification = specification_of(self._backend)
        remove_prefix_space(specification)
        return tokenizer_of(specification)

    def _original_ids(self, ids: list[int]) -> list[int]:
        return ids if self._ids_agree else [self._original_id.get(i, i) for i in ids]


def _repaired(messages: Sequence[Message]) -> list[Message]:
    return [m if (text := repair_text(m.content)) is m.content else replace(m, content=text) for m in messages]


def _with_fixed_date(source: str) -> str:
    """Return the template with a `strftime_now` of its own, which writes FIXED_DATE in each of the formats that are used."""
    formats = sorted({found[2] for found in re.finditer(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", source)})
    cases = "".join(f"{{%- if format == {f!r} -%}}{FIXED_DATE.strftime(f)}{{%- endif -%}}" for f in formats)
    return f"{{%- macro strftime_now(format) -%}}{cases}{{%- endmacro -%}}{source}" if formats else source


# Loading -----------------------------------------------------------------------------------------------------------------


def built_in_templates() -> list[str]:
    """Return the names that `--template` knows."""
    return sorted(p.name.removesuffix(".jinja") for p in BUILT_IN.iterdir() if p.name.endswith(".jinja"))


def load_tokenizer(model: str):
    """Load the tokenizer of a model's directory or Hub name. Raises UserError with one line; runs no remote code."""
    from transformers import AutoTokenizer

    path = Path(model)
    if path.is_dir() and not any(
        (path / f).exists() for f in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    ):
        raise UserError(f"{model}: the directory holds no tokenizer (tokenizer.json); save the model's tokenizer there")
    require_found(model)
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers raises a dozen kinds here, and tokenizers a bare Exception
        if is_ours(error):
            raise
        raise UserError(f"{model}: its tokenizer cannot be loaded ({first_line(error)})") from None


def load_template(model: str, template: str | None = None) -> ChatTemplate:
    """Load the tokenizer of `model`, and choose its chat template as `template_for` does. Raises UserError."""
    return template_for(load_tokenizer(model), template, model)


def template_for(tokenizer, template: str | None = None, model: str = "tokenizer") -> ChatTemplate:
    """Return the chat template to use with a tokenizer: the tokenizer's own, a built-in by name, or a `.jinja` file.

    Errors call the tokenizer `model`. Raises UserError if there is no such template, and TemplateError, a kind of it,
    where the loss mask cannot be derived.
    """
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
