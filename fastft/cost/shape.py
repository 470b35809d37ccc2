"""The shape of a model, from its config alone, and the setup of a run: what the formulas of memory and time depend on."""

from dataclasses import dataclass

from fastft.config import TrainConfig
from fastft.errors import UserError

FP32 = 4
"""Bytes of a number in fp32."""
MOMENTS_8BIT = 2 * (1 + FP32 / 256)
"""Bytes that torchao's 8-bit AdamW keeps for a parameter: two moments of 1 byte; 256 of them share a scale in fp32."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block."""

    name: str
    inputs: int
    outputs: int
    in_attention: bool

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """The sizes of a causal language model."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    block: int
    """Parameters of one block."""
    outside: int
    """Parameters of everything else: embeddings, last norm, and the head unless it is tied to the embeddings."""
    tied: bool
    """Head and embeddings share one weight."""
    linears: tuple[Linear, ...]
    """The linear layers of one block, in the order of the forward pass."""
    post_norms: bool
    """Attention and MLP have a norm after them, too (Gemma 2 and 3)."""
    qk_norms: bool
    """Queries and keys have a norm (Qwen 3, Gemma 3)."""
    wide_norms: bool
    """Norms apply their weight in fp32 (Gemma)."""
    softcap: bool
    """Logits are soft-capped by a tanh (Gemma 2)."""

    @property
    def parameters(self) -> int:
        return self.layers * self.block + self.outside


def load_shape(model_config, model: str) -> Shape:
    """The shape of the causal LM that transformers builds from `model_config`, on the meta device.

    Raises UserError for mixtures of experts, and for what cannot be built; `model` names it in the message.
    """
    from torch import nn

    from fastft.model.build import TrainedModel, build_model

    if any(getattr(model_config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UserError(f"{model}: the memory of mixtures of experts cannot be estimated")
    trained = TrainedModel(build_model(model_config, "eager", model))
    modules = list(trained.blocks[0].named_modules())
    linears = [
        Linear(name.rpartition(".")[2], module.in_features, module.out_features, "attn" in name)
        for name, module in modules
        if isinstance(module, nn.Linear)
    ]
    # Into the order of the forward pass: Phi-3 declares its output projection first.
    linears.sort(key=lambda linear: (not linear.in_attention, linear.name == "o_proj"))
    norms = [(name.rpartition(".")[2], type(m).__name__) for name, m in modules if type(m).__name__.endswith("Norm")]
    of_heads = [name for name, _ in norms if name in ("q_norm", "k_norm")]
    in_blocks = sum(p.numel() for p in trained.blocks.parameters())
    heads, hidden = model_config.num_attention_heads, model_config.hidden_size
    head = trained.causal_lm.get_output_embeddings()
    return Shape(
        layers=len(trained.blocks),
        hidden=hidden,
        mlp=getattr(model_config, "intermediate_size", None) or 4 * hidden,
        heads=heads,
        kv_heads=getattr(model_config, "num_key_value_heads", None) or heads,
        head_dim=getattr(model_config, "head_dim", None) or hidden // heads,
        vocabulary=head.out_features,
        block=in_blocks // len(trained.blocks),
        outside=sum(p.numel() for p in trained.parameters()) - in_blocks,
        tied=head.weight is trained.causal_lm.get_input_embeddings().weight,
        linears=tuple(linears),
        post_norms=len(norms) - len(of_heads) > 2,
        qk_norms=bool(of_heads),
        wide_norms=any(kind.startswith("Gemma") for _, kind in norms),
        softcap=bool(getattr(model_config, "final_logit_softcapping", None)),
    )


@dataclass(frozen=True)
class Setup:
    """The settings of a run on which its memory depends."""

    gpus: int = 1
    replicas: int = 1
    seq_len: int = 2048
    micro_batch: int = 1
    accumulates: bool = False
    """A step has several micro-batches, so the gradients of one are there together with the activations of the next."""
    checkpointing: str = "full"
    moments: float = 2.0 * FP32
    """Bytes of the optimizer's state for a trained parameter."""
    offload: bool = False
    lora_r: int = 0
    lora_targets: str = "all-linear"
    quantized: bool = False
    itemsize: int = 2
    """Bytes of a number in the data type of the computation."""
    flash: bool = True
    """Attention is variable-length flash attention; otherwise it is called for each conversation."""
    repeats_kv: bool = False
    """Attention keeps a copy of keys and values for every query head (varlen before torch 2.12)."""

    @property
    def shards(self) -> int:
        return self.gpus // self.replicas

    @property
    def tokens(self) -> int:
        return self.seq_len * self.micro_batch

    def adapters(self, shape: Shape) -> tuple[Linear, ...]:
        """The linear layers of a block that get an adapter."""
        if not self.lora_r:
            return ()
        named = [target.strip() for target in self.lora_targets.split(",")]
        return tuple(linear for linear in shape.linears if named == ["all-linear"] or linear.name in named)


def setup_of(config: TrainConfig, gpus: int, on_gpu: bool = True) -> Setup:
    """The setup of a run on `gpus` processes. Without `on_gpu` it computes in fp32, and attention is called per conversation."""
    from fastft.model.attention import varlen_repeats

    moments = {"adamw_8bit": MOMENTS_8BIT, "float32": 2.0 * FP32, "bfloat16": 4.0}
    optimizer = config.optimizer
    return Setup(
        gpus=gpus,
        replicas=config.replicas,
        seq_len=config.seq_len,
        micro_batch=config.micro_batch_size,
        accumulates=config.global_batch_size > gpus * config.micro_batch_size,
        checkpointing=config.gradient_checkpointing,
        moments=moments[optimizer.name if optimizer.name in moments else optimizer.state_dtype],
        offload=config.offload,
        lora_r=config.lora.r,
        lora_targets=config.lora.targets,
        quantized=config.lora.quantize != "none",
        itemsize=2 if on_gpu else FP32,
        flash=on_gpu and config.attention != "documents",
        repeats_kv=on_gpu and config.attention in ("auto", "varlen") and varlen_repeats(),
    )
