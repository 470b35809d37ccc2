"""Fixtures of the model's tests."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastft.model.attention import choose_attention
from fastft.model.build import TrainedModel


@pytest.fixture
def trained_model(model) -> TrainedModel:
    attention, _ = choose_attention("auto", torch.device("cpu"))
    trained = TrainedModel(AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention))
    trained.reshard = lambda: None  # of a sharded one
    return trained
