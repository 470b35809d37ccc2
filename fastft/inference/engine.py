"""Talk to a model in the terminal: `fastft chat --model DIR`.

Streams the answer, keeps the history, stops at the model's own end of turn. `/reset` forgets the conversation, `/quit`
(or Ctrl-D) leaves, Ctrl-C stops an answer. Texts are tokenised so that nothing typed becomes a control token.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fastft.data.conversation import Message
from fastft.data.template.chat_template import ChatTemplate, load_template
from fastft.errors import UserError


class ChatModel:
    """A model directory ready to answer: weights on the GPU in bf16 where there is one, else on CPU in fp32."""

    def __init__(self, model: str, template: str | None = None):
        """Raises UserError with one line when the directory is no chat model."""
        import torch

        from fastft.model.pretrained import load_config

        self.window = getattr(load_config(model), "max_position_embeddings", None) or 1 << 20
        self.template = load_template(model, template)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_weights(model, torch.bfloat16 if self.device.type == "cuda" else torch.float32).to(
            self.device
        )

    def stream(self, messages: list[Message], max_new_tokens: int = 512, temperature: float = 0.0) -> Iterator[str]:
        """Yield the answer to `messages` piece by piece, up to the end of turn or `max_new_tokens`.

        The oldest rounds are left out of the prompt when it would not fit the model's window (a leading system message
        stays). Raises UserError when even the last message does not fit.
        """
        import torch

        ids = self._fitting_prompt(messages, max_new_tokens)
        cache, fed = None, torch.tensor([ids], device=self.device)
        text = _Decoder(self.template)
        with torch.inference_mode():
            for _ in range(min(max_new_tokens, self.window - len(ids))):
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
    ) -> list["BatchAnswer"]:
        """Answer several dialogues at once, padded on the left. Raises UserError when a last message does not fit."""
        import torch

        prompts = [self._fitting_prompt(messages, max_new_tokens) for messages in dialogues]
        longest, stops = max(map(len, prompts)), sorted(self.template.stop_token_ids)
        ids_BT = torch.tensor([[stops[0]] * (longest - len(ids)) + ids for ids in prompts], device=self.device)
        mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=self.device)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature > 0
            else {"do_sample": False}
        )
        length = min(max_new_tokens, self.window - longest)
        with torch.inference_mode():
            out_BT = self.model.generate(
                ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=length,
                eos_token_id=stops,
                pad_token_id=stops[0],
                **sampling,
            )
        answers = []
        for ids, row in zip(prompts, out_BT[:, longest:].tolist()):
            end = next((i for i, token in enumerate(row) if token in self.template.stop_token_ids), None)
            text = self.template.tokenizer.decode(
                row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            reason, count = ("length", len(row)) if end is None else ("stop", end + 1)
            answers.append(BatchAnswer(text.removeprefix(self.template.separator), len(ids), count, reason))
        return answers

    def _fitting_prompt(self, messages: list[Message], max_new_tokens: int) -> list[int]:
        system = [m for m in messages[:1] if m.role == "system"]
        turns = messages[len(system) :]
        while True:
            ids = self.template.encode_prompt([*system, *turns])
            if len(ids) < self.window and (len(ids) + max_new_tokens <= self.window or len(turns) <= 2):
                return ids
            if len(turns) <= 2:
                raise UserError(f"the message is {len(ids)} tokens long; the model's window is {self.window}")
            turns = turns[2:]


@dataclass(frozen=True)
class BatchAnswer:
    """`finish_reason` is "stop" or, where the answer had to be cut, "length"."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str


class _Decoder:
    """Token ids to text, piece by piece, at a constant cost per token."""

    def __init__(self, template: ChatTemplate):
        self.decode, self.separator = template.tokenizer.decode, template.separator
        self.shown, self.ids, self.begun = [], [], False  # tokens shown last (a context), tokens not shown yet

    def add(self, token: int) -> str:
        """The text that `token` completes; "" while a character's bytes are still to come."""
        self.ids.append(token)
        text = self._new_text()
        if text.endswith("\ufffd") and len(self.ids) < 8:
            return ""
        self.shown, self.ids = self.ids, []
        return self._without_separator(text)

    def rest(self) -> str:
        """What is left at the end, the stump of a character perhaps."""
        return self._without_separator(self._new_text()) if self.ids else ""

    def _new_text(self) -> str:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return self.decode([*self.shown, *self.ids], **options)[len(self.decode(self.shown, **options)) :]

    def _without_separator(self, text: str) -> str:
        """The template's own space before an answer is no part of it: the template will put it there again."""
        if not self.begun and text:
            self.begun = True
            return text.removeprefix(self.separator)
        return text


def load_weights(model: str, dtype):
    """The causal language model in a directory, ready to answer, on the CPU. Raises UserError where it cannot be loaded."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{model}: the model cannot be loaded ({str(error).strip().splitlines()[0]})") from None


def _pick(logits_V, temperature: float) -> int:
    """The likeliest token at temperature 0, else a draw."""
    if temperature <= 0:
        return int(logits_V.argmax())
    return int((logits_V.float() / temperature).softmax(-1).multinomial(1))
