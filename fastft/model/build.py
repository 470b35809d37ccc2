"""Builds the model for training: on the meta device, then with gradient checkpointing, compiled, sharded, and last filled
with weights.

`TrainedModel` wraps a causal LM of transformers, so that one forward pass maps a packed micro-batch to its summed loss. The
head runs on the trained positions only, and inside the forward pass of the root FSDP unit: outside of it, the gradient of its
weight would silently be that of one rank alone.
"""

import copy
import logging

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from fastft.config import TrainConfig
from fastft.errors import UserError, first_line, is_ours
from fastft.model import lora, weights
from fastft.model.activation_checkpointing import recompute
from fastft.model.float8 import use_float8
from fastft.model.loss import summed_cross_entropy
from fastft.model.pretrained import load_config
from fastft.model.rope_scaling import require_scaled

logger = logging.getLogger(__name__)


class TrainedModel(nn.Module):
    """A causal LM that returns the summed cross entropy of a packed micro-batch."""

    def __init__(self, causal_lm: nn.Module):
        super().__init__()
        config = causal_lm.config
        if getattr(config, "logit_scale", None) or getattr(config, "logits_scaling", 1) != 1:
            raise UserError(f"{config.model_type}: models that scale their logits are not supported")
        # The loss uses the head's weight and bias, and never calls the head.
        if type(causal_lm.get_output_embeddings()) is not nn.Linear:
            raise UserError(
                f"{config.model_type}: models whose output head is not a plain linear layer are not supported"
            )
        self.causal_lm = causal_lm
        self.z_loss = 0.0
        """Weight of the z-loss (see fastft.model.loss), which counts in training mode only."""
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
        """Return (the summed loss, the z-loss that it contains) of a flat row: scalars in fp32, both multiplied by `scale`.

        Of the N tokens of the row, those at `loss_index` predict the n trained tokens `targets`. Shapes: input_ids,
        position_ids [1, N] int64; cu_seqlens [documents + 1] int32; loss_index, targets [n] int64.
        """
        hidden_nD = self._hidden(loss_index, input_ids, position_ids, cu_seqlens, max_seqlen)
        head, z_weight = self.causal_lm.get_output_embeddings(), self.z_loss if self.training else 0.0
        return summed_cross_entropy(hidden_nD, targets, head, scale, self.logit_softcap, z_weight)

    def likeliest(
        self, index: Tensor, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """The likeliest tokens [n] int64 to follow the positions `index` [n] of a packed row; collective. Shapes as in `forward`.

        Soft-capping is left out, because it does not change the order of the logits.
        """
        hidden_nD = self._hidden(index, input_ids, position_ids, cu_seqlens, max_seqlen)
        return self.causal_lm.get_output_embeddings()(hidden_nD).argmax(-1)

    def _hidden(
        self, index: Tensor, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """The last hidden states [n, D] at the positions `index`."""
        hidden_1ND = self.causal_lm.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        ).last_hidden_state
        return hidden_1ND[0, index]

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder layers, the units of sharding, checkpointing and compiling."""
        lists = [m for m in self.causal_lm.base_model.children() if isinstance(m, nn.ModuleList) and len(m)]
        if len(lists) != 1:
            raise UserError(
                f"{self.causal_lm.config.model_type}: its decoder layers cannot be found; is it a causal language model?"
            )
        return lists[0]


def prepare_model(
    config: TrainConfig,
    model_config,
    attention: str,
    device: torch.device,
    resumed: bool = False,
) -> TrainedModel:
    """Build the sharded model with its weights, in training mode; trained weights are in fp32. Collective.

    `model_config` is what `fit_config` returned, `attention` the backend's name in transformers. If the run is `resumed`,
    trained weights get no values here, because they are read from the checkpoint. Raises UserError if the model cannot be
    built or read.
    """
    mesh = make_mesh(device, config.replicas)
    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, read = assemble(config, model_config, attention, low)
    causal_lm, blocks = model.causal_lm, model.blocks
    model.z_loss = config.z_loss
    quantized: set[nn.Parameter] = set()
    weights.fill_buffers(model, read)
    if config.lora.quantize != "none":
        quantized = lora.load_quantized(causal_lm, read, device)
    if config.compile and config.gradient_checkpointing != "none" and attention.endswith("documents"):
        logger.warning(
            "compile has no effect: the documents attention cannot be compiled inside gradient_checkpointing"
        )
    if config.float8:
        logger.info(use_float8(blocks, device))
    for block in blocks:
        recompute(block, config.gradient_checkpointing)
        if config.compile:
            block.compile(dynamic=False)  # training batches have constant shapes, and static shapes are the fastest
    shard(model, mesh, config.offload, quantized)
    home = torch.device("cpu") if config.offload else device
    dtype = lambda parameter: torch.float32 if parameter.requires_grad else low  # noqa: E731
    weights.fill(model, read, home, dtype, wanted=lambda parameter: not (resumed and parameter.requires_grad))
    return model.train()


def assemble(config: TrainConfig, model_config, attention: str, low: torch.dtype) -> tuple[TrainedModel, weights.Read]:
    """Build the model on the meta device, with its adapters, and open its weights; collective. 4-bit layers compute in `low`."""
    causal_lm = build_model(model_config, attention, config.model)
    if config.extend != "none":
        require_scaled(causal_lm, load_config(config.model))
    model = TrainedModel(causal_lm)
    blocks = model.blocks  # before the weights are opened, because the error about a model without blocks says more
    source = weights.open_weights(config.model, causal_lm)

    def read(name: str) -> weights.Rows:
        name = name.removeprefix("causal_lm.")
        if lora.is_adapter(name):
            return lora.start(name, causal_lm.get_parameter(name).shape, config.seed)
        return source(lora.plain_name(name))

    if config.lora.r:
        lora.add_adapters(causal_lm, blocks, config.lora, config.model, low)
    return model, read


def make_mesh(device: torch.device, replicas: int) -> DeviceMesh:
    """The mesh of all processes: one dimension, or [replicas, shards], in which consecutive ranks form a replica."""
    world = dist.get_world_size()
    if world % replicas:
        raise UserError(f"replicas {replicas} does not divide the {world} processes")
    if replicas == 1:
        return init_device_mesh(device.type, (world,))
    return init_device_mesh(device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def build_model(model_config, attention: str, name: str) -> nn.Module:
    """Build transformers' causal LM for this config, with parameters on the meta device, and computed buffers on the CPU."""
    causal_lm = without_values(model_config, torch.float32, name, attn_implementation=attention)
    weights.compute_buffers(causal_lm)
    return causal_lm


def without_values(model_config, dtype: torch.dtype, name: str, **options) -> nn.Module:
    """Build transformers' causal LM for this config on the meta device. Raises UserError if it cannot be built."""
    from transformers import AutoModelForCausalLM

    if getattr(model_config, "quantization_config", None):
        raise UserError(
            f"{name}: its weights are quantized; train the original ones, with lora.quantize nf4 to save memory"
        )
    try:
        with torch.device("meta"):
            # A copy, because transformers writes `dtype` into the config, from which the export takes the files' data type.
            return AutoModelForCausalLM.from_config(copy.deepcopy(model_config), dtype=dtype, **options)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        if is_ours(error):
            raise
        raise UserError(f"{name}: the model cannot be built ({first_line(error)})") from None


def shard(model: TrainedModel, mesh: DeviceMesh, offload: bool, whole: set[nn.Parameter]) -> None:
    """Shard the model over `mesh` with FSDP2: each block is a unit, and the rest (embeddings, norm, head) is the root unit.

    Parameters in `whole` are not sharded. GPUs compute in bf16 and reduce gradients in fp32; CPUs do all in fp32. Gradients
    are summed, not averaged, because the loss is divided by the global number of tokens already.
    """
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {
        "mesh": mesh,
        "mp_policy": mixed if mesh.device_type == "cuda" else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
        "ignored_params": whole,
    }
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "likeliest")
    for module in (model, *model.blocks):
        module.set_gradient_divide_factor(1.0)
        # NCCL's alternative, a pre-multiplied sum, gives zeros in bf16 up to torch 2.13.
        module.set_force_sum_reduction_for_comms(True)


def uncompiled():
    """A context in which compiled blocks run without their compiled code, for inputs of other shapes than training batches.

    Otherwise every block would be compiled again for each shape, up to the limit of 8
    (torch._dynamo.config.recompile_limit).
    """
    return torch.compiler.set_stance("force_eager")
