"""Tiny random models, one for each family of architectures, saved as directories such as a user would name."""

import json
import random
from pathlib import Path

import torch
from helpers import tiny

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": {},
    "llama_tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 24},
    "gemma": {},
    "gemma2": {
        "sliding_window": 24,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {
        "sliding_window": 24,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": {"pad_token_id": 0},
    "phi3": {"pad_token_id": 0},
}


def make_model(path: Path, family: str = "llama", template: str = "chatml", **sizes) -> Path:
    """Save a random model of `family` with the byte-level tokenizer and a built-in chat template."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from fastft.data.template.chat_template import template_for

    tokenizer = tiny.byte_level()
    tokenizer.chat_template = template_for(tokenizer, template).source
    options = {**SIZES, **FAMILIES.get(family, {}), **sizes}
    # More than needed, as in published models; Qwen2's tokenizer adds a token when it is loaded.
    rows = len(tokenizer) + 3
    config = AutoConfig.for_model(family.removesuffix("_tied"), **{"vocab_size": rows, "dtype": "float32", **options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # norms start at exactly 1 or 0, which could hide a missing gradient
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_endless_model(path: Path, **sizes) -> Path:
    """Save a model that says "a" for ever, whatever it is asked: attention and MLPs add nothing to embeddings that are all
    alike, and only one row of the output layer is not 0."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_model(path, **{"max_position_embeddings": 1 << 18, **sizes})
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(0.0 if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")) else 1.0)
    [letter] = AutoTokenizer.from_pretrained(path).encode("a", add_special_tokens=False)
    model.lm_head.weight.data[letter] = 1.0
    model.save_pretrained(path)
    return path


def make_data(path: Path, conversations: int = 24, seed: int = 0) -> Path:
    """Write conversations of different lengths, some of whose answers are not trained."""
    source = random.Random(seed)
    words = "the quick brown fox jumps over a lazy dog and says hello to every row of the packing plan".split()
    text = lambda low, high: " ".join(source.choices(words, k=source.randint(low, high)))  # noqa: E731
    with open(path, "w") as out:
        for i in range(conversations):
            messages = []
            for _ in range(source.randint(1, 3)):
                messages.append({"role": "user", "content": text(1, 12)})
                messages.append({"role": "assistant", "content": text(1, 20), "train": source.random() > 0.2})
            out.write(json.dumps({"id": f"c{i}", "messages": messages}) + "\n")
    return path
