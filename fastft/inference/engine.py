"""Run a model's directory: stream one answer, or answer a batch of dialogues.

    model = ChatModel("runs/first/model")
    for piece in model.stream([Message("user", "Hello")]): print(piece, end="")
    answers = model.answer_batch([[Message("user", "Hello")], [Message("user", "And you?")]])

Texts are tokenised so that nothing in them becomes a control token, and an answer ends at the model's own end of turn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastft.data.conversation import Message
from fastft.data.template.chat_template import ChatTemplate, load_template
from fastft.errors import UserError, first_line, is_ours

DECODING = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
NO_LIMIT = 1 << 20  # tokens, for a model whose config gives no context length


@dataclass(frozen=True)
class BatchAnswer:
    """An answer of `answer_batch`. `finish_reason` is "stop", or "length" if the answer had to be cut."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str


class ChatModel:
    """A model's directory, ready to answer: its weights are in bf16 on the GPU if there is one, else in fp32 on the CPU."""

    def __init__(self, model: str, template: str | None = None, dtype: str | None = None):
        """Load the model. `dtype` is the name of torch's type for the weights, if not the usual one.

        Raises UserError with one line when the directory holds no chat model.
        """
        import torch

        from fastft.model.pretrained import load_config

        self.context_length = getattr(load_config(model), "max_position_embeddings", None) or NO_LIMIT
        self.template = load_template(model, template)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        usual = "bfloat16" if self.device.type == "cuda" else "float32"
        self.model = load_weights(model, getattr(torch, dtype or usual)).to(self.device)

    def stream(self, messages: list[Message], max_new_tokens: int = 512, temperature: float = 0.0) -> Iterator[str]:
        """Yield the answer to `messages` piece by piece, up to the end of turn or `max_new_tokens`.

        The oldest rounds are left out of the prompt when it would not fit the model's context; a leading system message
        stays. Raises UserError when even the last message does not fit.
        """
        import torch

        ids = self._fitting_prompt(messages, max_new_tokens)
        cache, fed = None, torch.tensor([ids], device=self.device)
        text = _Decoder(self.template)
        with torch.inference_mode():
            for _ in range(min(max_new_tokens, self.context_length - len(ids))):
                out = self.model(input_ids=fed, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                token = _pick(out.logits[0, -1], temperature)
                if token in self.template.stop_token_ids:
                    break
                fed = torch.tensor([[token]], device=self.device)
                yield text.add(token)
        yield text.rest()

    def answer_batch(
        self, dialogues: list[list[Message]], max_new_tokens: int = 512, temperature: float = 0.0
    ) -> list[BatchAnswer]:
        """Answer several dialogues at once, padded on the left. Raises UserError when a last message does not fit."""
        import torch

        prompts = [self._fitting_prompt(messages, max_new_tokens) for messages in dialogues]
        longest, stops = max(map(len, prompts)), sorted(self.template.stop_token_ids)
        ids_BT = torch.tensor([[stops[0]] * (longest - len(ids)) + ids for ids in prompts], device=self.device)
        mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=self.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        with torch.inference_mode():
            out_BT = self.model.generate(
                ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=min(max_new_tokens, self.context_length - longest),
                eos_token_id=stops,
                pad_token_id=stops[0],
                **sampling,
            )
        return [self._answer(len(ids), row) for ids, row in zip(prompts, out_BT[:, longest:].tolist())]

    def _answer(self, prompt_tokens: int, row: list[int]) -> BatchAnswer:
        """Return the answer in a row of generated tokens, which may be padded after the end of turn."""
        end = next((i for i, token in enumerate(row) if token in self.template.stop_token_ids), None)
        text = self.template.tokenizer.decode(row[:end], **DECODING).removeprefix(self.template.separator)
        if end is None:
            return BatchAnswer(text, prompt_tokens, len(row), "length")
        return BatchAnswer(text, prompt_tokens, end + 1, "stop")

    def _fitting_prompt(self, messages: list[Message], max_new_tokens: int) -> list[int]:
        """Return the prompt's tokens, without the oldest rounds if prompt and answer would exceed the context."""
        system = [m for m in messages[:1] if m.role == "system"]
        turns = messages[len(system) :]
        while True:
            ids = self.template.encode_prompt([*system, *turns])
            fits = len(ids) + max_new_tokens <= self.context_length
            if len(ids) < self.context_length and (fits or len(turns) <= 2):
                return ids
            if len(turns) <= 2:
                raise UserError(
                    f"the message is {len(ids)} tokens long; the model's context length is {self.context_length}"
                )
            turns = turns[2:]


class _Decoder:
    """Turn token ids into text, piece by piece, at a constant cost per token."""

    def __init__(self, template: ChatTemplate):
        self.decode, self.separator = template.tokenizer.decode, template.separator
        self.shown: list[int] = []  # the tokens shown last, as context: some tokenizers decode a token by its neighbour
        self.ids: list[int] = []  # tokens not shown yet
        self.begun = False

    def add(self, token: int) -> str:
        """Return the text that `token` completes, "" while bytes of a character are still to come."""
        self.ids.append(token)
        text = self._new_text()
        if text.endswith("\ufffd") and len(self.ids) < 8:
            return ""
        self.shown, self.ids = self.ids, []
        return self._without_separator(text)

    def rest(self) -> str:
        """Return the remaining text at the end, which may be an incomplete character."""
        return self._without_separator(self._new_text()) if self.ids else ""

    def _new_text(self) -> str:
        return self.decode([*self.shown, *self.ids], **DECODING)[len(self.decode(self.shown, **DECODING)) :]

    def _without_separator(self, text: str) -> str:
        """Remove the template's own space before an answer, since the template will put it there again."""
        if not self.begun and text:
            self.begun = True
            return text.removeprefix(self.separator)
        return text


def load_weights(model: str, dtype: Any) -> Any:
    """The causal language model in a directory, ready to answer, on the CPU. Raises UserError if it cannot be loaded."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    # A file is missing, is no model's, or has other shapes.
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_ours(error):
            raise
        raise UserError(f"{model}: the model cannot be loaded ({first_line(error)})") from None


def _pick(logits_V: Any, temperature: float) -> int:
    """Return the likeliest token at temperature 0, else a draw."""
    if temperature <= 0:
        return int(logits_V.argmax())
    return int((logits_V.float() / temperature).softmax(-1).multinomial(1))
