"""The model in training: load, attention backend, gradient checkpointing, compile, shard.

`TrainedModel` wraps a transformers causal LM so that one forward maps a packed micro-batch to its summed loss: the head
runs inside the root FSDP unit's forward (read outside, its weight's gradient would silently be one rank's only) and
only on the positions that are trained.
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fastft.loss import summed_cross_entropy


class TrainedModel(nn.Module):
    """A causal LM that returns the summed cross entropy of a packed micro-batch."""

    def __init__(self, causal_lm: nn.Module):
        super().__init__()
        config = causal_lm.config
        if getattr(config, "logit_scale", None) or getattr(config, "logits_scaling", 1) != 1:
            raise ValueError(f"{config.model_type}: models that scale their logits are not supported")
        if (
            type(causal_lm.get_output_embeddings()) is not nn.Linear
        ):  # the loss computes with its weight, not through it
            raise ValueError(
                f"{config.model_type}: models whose output head is no plain linear layer are not supported"
            )
        self.causal_lm = causal_lm
        self.z_loss = 0.0
        """Weight of the z-loss (see fastft.loss); left out in evaluation mode."""
        self.logit_softcap = getattr(config, "final_logit_softcapping", None)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        loss_index: Tensor,
        targets: Tensor,
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Shapes for a flat row of N tokens, n of them predicting a trained one: input_ids, position_ids [1, N] int64;
        cu_seqlens [documents + 1] int32; loss_index, targets [n] int64. Returns the loss and the z-loss in it, scalars in
        fp32, both times `scale`.
        """
        hidden_1ND = self.causal_lm.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        ).last_hidden_state
        head, z_weight = self.causal_lm.get_output_embeddings(), self.z_loss if self.training else 0.0
        return summed_cross_entropy(hidden_1ND[0, loss_index], targets, head, scale, self.logit_softcap, z_weight)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder layers, the units of sharding, checkpointing and compiling."""
        lists = [m for m in self.causal_lm.base_model.children() if isinstance(m, nn.ModuleList) and len(m)]
        if len(lists) != 1:
            raise ValueError(
                f"{self.causal_lm.config.model_type}: cannot tell its decoder layers; is it a causal language model?"
            )
        return lists[0]


def load_config(model: str):
    """The model's transformers config. Raises ValueError with one line; runs no remote code."""
    from transformers import AutoConfig

    path = Path(model)
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"{model}: the directory holds no model (config.json)")
    if not path.exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ValueError(f"{model}: no such directory")
    try:
        return AutoConfig.from_pretrained(model)
    except Exception as error:  # transformers and the Hub raise a dozen kinds here
        raise ValueError(f"{model}: the model's config cannot be read ({str(error).strip().splitlines()[0]})") from None


def load_model(model: str, attention: str, gradient_checkpointing: bool) -> TrainedModel:
    """Weights in fp32 on CPU (the master copy), ready to shard. `attention` is transformers' name of the backend."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        causal_lm, info = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
        )
    except Exception as error:  # a dozen kinds: files cut short, shapes that differ, architectures that are none
        raise ValueError(f"{model}: the model cannot be loaded ({str(error).strip().splitlines()[0]})") from None
    if missing := sorted(info["missing_keys"]):  # transformers would train them from random numbers
        raise ValueError(f"{model}: {len(missing)} weights are missing from its files, the first {missing[0]}")
    if gradient_checkpointing:
        # One switch under two names: it was renamed during transformers 5. FSDP2's hooks stay outside the checkpoint.
        enable = getattr(causal_lm, "activation_checkpointing_enable", None) or causal_lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return TrainedModel(causal_lm).train()


def shard(model: TrainedModel, mesh: DeviceMesh, compile_blocks: bool) -> TrainedModel:
    """FSDP2 over `mesh`: each block a unit, the rest (embeddings, norm, head) the root. Order: compile, then shard.

    bf16 for the computation and fp32 for the reduction on GPU; fp32 throughout on CPU. Gradients are summed, not
    averaged: the trainer has divided by the global token count already.
    """
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mesh": mesh, "mp_policy": mixed if mesh.device_type == "cuda" else MixedPrecisionPolicy()}
    for block in model.blocks:
        if compile_blocks:
            block.compile()
        fully_shard(block, **options)
    fully_shard(model, **options)
    for module in (model, *model.blocks):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # NCCL's pre-multiplied sum zeroes bf16 up to torch 2.13
    return model


@torch.no_grad()
def prove_isolation(model: TrainedModel, device: torch.device) -> None:
    """Run two conversations in one row, change the first, and require the second's loss to stay as it is; collective.

    Architectures that carry a state from token to token, or that pass over `cu_seqlens`, would train on a mixture of
    conversations without a word. Raises ValueError naming the architecture.
    """
    name, words = model.causal_lm.config.model_type, model.causal_lm.config.vocab_size
    length = 8
    tokens = torch.arange(2 * length, device=device)
    arguments = {
        "position_ids": (tokens % length)[None],
        "cu_seqlens": torch.tensor([0, length, 2 * length], dtype=torch.int32, device=device),
        "max_seqlen": 2 * length,
        "loss_index": tokens[length:-1],
        "targets": tokens[length + 1 :] % words,
    }
    other = torch.where(tokens < length, tokens + length, tokens)
    model.eval()
    try:
        loss, changed = (float(model(input_ids=(ids % words)[None], **arguments)[0]) for ids in (tokens, other))
    except (KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name}: models of this architecture cannot be trained on packed rows ({error!r})") from None
    model.train()
    model.reshard()  # without a backward pass the root would stay whole, and the optimiser would be given its whole weights
    if abs(loss - changed) > 1e-5 * abs(loss):
        raise ValueError(f"{name}: in models of this architecture, conversations that share a row see each other")


def model_fingerprint(model: str, config) -> str:
    """Tells one model from another by its config and by the names, sizes and first 64 KiB of its weight files.

    (A safetensors file begins with the names, shapes and places of its tensors. For a Hub name: the commit.)
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(config.to_diff_dict(), sort_keys=True, default=str).encode())
    for path in sorted(p for p in Path(model).glob("*") if p.suffix in (".safetensors", ".bin")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
    digest.update(str(getattr(config, "_commit_hash", None)).encode())
    return digest.hexdigest()


def count_parameters(model: TrainedModel) -> tuple[int, int]:
    """(parameters in the blocks, parameters in the output head), whole, whatever the sharding."""
    body = sum(p.numel() for p in model.blocks.parameters())
    return body, model.causal_lm.get_output_embeddings().weight.numel()
