"""Score answers with a reward model: a directory with a sequence classifier of one output (AutoModelForSequenceClassification).

    model = RewardModel("models/reward")
    scores = model.score([("What is 2 + 2?", "4"), ("What is 2 + 2?", "5")])      # one number a pair, on the model's own scale

Its chat template says how a dialogue becomes text; weights are read from safetensors only, and no code of the directory runs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastft.data.conversation import Message
from fastft.errors import UserError, first_line, is_ours


class RewardModel:
    """A reward model, in bf16 on the GPU if there is one, else in fp32 on the CPU."""

    def __init__(self, directory: str, batch_size: int = 16):
        """Raises UserError, in one line, for a directory that holds no reward model."""
        import torch

        from fastft.judge.answer import fingerprint

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.template, self.batch_size = require_reward_model(directory), batch_size
        self.model = _load(directory, torch.bfloat16 if self.device.type == "cuda" else torch.float32).to(self.device)
        self.digest = fingerprint(Path(directory))
        limit = getattr(self.model.config, "max_position_embeddings", None)
        self.longest = limit or 1 << 20

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The score of each (question, answer), in batches of similar length."""
        encoded = [
            each.ids[-self.longest :]
            for each in self.template.encode_many([[Message("user", q), Message("assistant", a)] for q, a in pairs])
        ]
        order = sorted(range(len(pairs)), key=lambda index: len(encoded[index]))
        scores = [0.0] * len(pairs)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, score in zip(batch, self._batch([encoded[index] for index in batch])):
                scores[index] = score
        return scores

    def _batch(self, rows: list[list[int]]) -> list[float]:
        import torch

        # The model reads its score at the last token that is no padding, which it recognises by its id. A text may end with
        # the tokenizer's own padding token (often the end of turn), so padding gets an id that no text of the batch has.
        used = {token for row in rows for token in row}
        pad = next(token for token in range(len(used) + 1) if token not in used)
        self.model.config.pad_token_id = pad
        longest = max(map(len, rows))
        ids_BT = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=self.device)
        mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
        with torch.inference_mode():
            return self.model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, 0].float().tolist()


def require_reward_model(directory: str) -> Any:
    """The chat template of a reward model. Raises UserError for what can be seen to be none without loading its weights."""
    from transformers import AutoConfig

    from fastft.data.template.chat_template import load_template

    if not (Path(directory) / "config.json").is_file():
        raise UserError(f"{directory}: the directory holds no model (config.json)")
    try:
        outputs = AutoConfig.from_pretrained(directory).num_labels
    except (OSError, ValueError) as error:
        if is_ours(error):
            raise
        raise UserError(f"{directory}: the model's config cannot be read ({first_line(error)})") from None
    if outputs != 1:
        raise UserError(f"{directory}: has {outputs} outputs; a reward model has one (num_labels: 1)")
    return load_template(directory)


def _load(directory: str, dtype: Any) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_ours(error):
            raise
        raise UserError(f"{directory}: the reward model cannot be loaded ({first_line(error)})") from None
    if missing := sorted(found["missing_keys"]):  # transformers would fill them with random numbers
        raise UserError(f"{directory}: is no reward model: its weights have no {missing[0]}")
    return model.eval()
