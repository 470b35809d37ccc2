"""What only a GPU can show: no step waits for the device, and nothing is compiled again after the second step."""

import pytest
import torch
from helpers import models
from helpers.training import flags

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NOT CHECKED HERE: host syncs and recompiles need a GPU"
)


@pytest.fixture
def wide_ground(tmp_path, monkeypatch):
    """A model wide enough for flash attention, some conversations, and an empty cache of tokens."""
    monkeypatch.setenv("FASTFT_CACHE", str(tmp_path / "cache"))
    models.make_model(tmp_path / "model", hidden_size=128, head_dim=32, num_attention_heads=4, num_key_value_heads=4)
    models.make_data(tmp_path / "data.jsonl")
    return tmp_path


def test_a_step_neither_waits_for_the_device_nor_compiles_again(wide_ground, monkeypatch):
    from fastft.cli import main
    from fastft.train import loop

    step, graphs = loop.train_step, []

    def watched(*arguments):
        torch.cuda.set_sync_debug_mode("error" if len(graphs) >= 2 else "default")
        try:
            return step(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    monkeypatch.setattr(loop, "train_step", watched)
    assert main(["train", *flags(wide_ground, wide_ground / "out", "--compile", "true", "--log_every", "100")]) == 0
    assert len(graphs) == 9 and graphs[1] == graphs[-1] > 0
