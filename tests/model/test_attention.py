"""Which attention is chosen, for GPUs and packages that are not here."""

import pytest
import torch

from fastft.model import attention
from fastft.model.attention import choose_attention

FA2, FA3, FA4 = "flash_attn.flash_attn_interface", "flash_attn_interface", "flash_attn.cute"


@pytest.mark.parametrize(
    ("capability", "installed", "version", "requested", "chosen", "switched"),
    [
        ((9, 0), {FA2, FA3}, "2.11.0", "auto", "varlen", ["FA3"]),
        ((9, 0), {FA3, FA4}, "2.13.0+cu130", "varlen", "varlen", ["FA3"]),
        ((9, 0), {FA4}, "2.13.0", "auto", "varlen", ["FA4"]),
        ((9, 0), {FA4}, "2.11.0", "auto", "varlen", []),  # torch would refuse its backward pass
        ((10, 0), {FA3, FA4}, "2.13.0", "auto", "varlen", ["FA4"]),
        ((8, 0), {FA2, FA3, FA4}, "2.13.0", "auto", "flash_attn", []),
        ((9, 0), {FA2, FA3}, "2.13.0", "flash_attn", "flash_attn", []),
        ((9, 0), {FA3}, "2.13.0", "documents", "documents", []),
        ((9, 0), set(), "2.13.0", "auto", "varlen", []),
        ((7, 5), {FA2}, "2.13.0", "auto", "documents", []),
    ],
)
def test_the_kernels_are_those_for_the_gpu(monkeypatch, capability, installed, version, requested, chosen, switched):
    on = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", on.append)
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(attention, "_installed", lambda module: module in installed)
    backend, why = choose_attention(requested, torch.device("cuda"))
    assert (backend, on) == (f"fastft_{chosen}", switched)
    assert all(name in why for name in switched)


def test_a_module_that_cannot_be_imported_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "broken_kernels").mkdir()
    (tmp_path / "broken_kernels" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    found = [
        attention._installed(name) for name in ("json.decoder", "no_such.module", "no_such", "broken_kernels.interface")
    ]
    assert found == [True, False, False, False]
