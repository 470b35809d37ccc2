"""How much memory a training step takes on each GPU, part by part, from the model's config alone.

    shape = load_shape(load_config(config.model), config.model)     # parameters counted on the meta device; no weights
    peak = peak_memory(shape, setup_of(config, gpus=8))             # a Memory: bytes of each part at the step's peak
    relief(shape, setup_of(config, gpus=8))                         # settings that lower it, the most helpful first

Everything is counted, nothing fitted: parameters from the model's own modules, the rest from what FSDP2, autograd and the
loss hold at the moments that can be a step's peak (`_moments`). benchmarks/memory.py and the tests hold it beside the
tensors of real steps. Units are bytes, and per GPU, unless a name says otherwise.

What one block keeps for its backward pass, in bytes a token
------------------------------------------------------------
For a hidden size D, a feed-forward width F, H query heads and K key-value heads of d entries, and b bytes a number of
the computation (2: bf16 on GPUs, whose master weights are fp32; 4: fp32 on CPU). Eager modules of transformers 5.23;
torch.compile keeps less.

- RMSNorm of Llama, Mistral, Qwen and Phi-3: `x.to(float32)`, of which the square and the product need the copy (4 D);
  the normalised x in the data type of the computation, for the gradient of the weight (b D); the product with the
  weight, which the linear layers behind it need (b D).
- RMSNorm of Gemma: the weight is applied in fp32, so the normalised x is kept in fp32 (4 D) beside the copy (4 D).
- Norms behind attention and MLP (Gemma 2 and 3): the same without the result, which is added and not multiplied.
- Norms of query and key (Qwen 3, Gemma 3): the same over (H + K) d entries, again without the result.
- Flash attention: query and key behind their rotation, value, output: b d (2 H + 2 K), and a logsumexp, 4 H. The
  rotation keeps nothing but cosine and sine, which all blocks share. Phi-3 projects query, key and value in one: the
  value is a view that keeps all of it, b d (H + K) more, and its rotation leaves the heads in an order in which the
  output has to be copied for the projection behind it, b d H more.
- varlen before torch 2.12 repeats keys and values for every query head: H instead of K.
- Attention per document (`documents`): the parts are joined to a tensor of their own, b d H more.
- SwiGLU and GeGLU: gate, activated gate, up, and their product: 4 b F.
- LoRA freezes norms and linear layers: a norm needs no normalised x, but every adapter keeps its r inner values (b r).

Llama-2-7B (D 4096, F 11008, H = K = 32, d 128), bf16: 65,536 for the norms, 32,896 for attention, 88,064 for the MLP:
186,496 bytes a token and block. (34 D = 139,264 is what Korthikanti et al., 2022, count for a GPT block, in which norms
make no copy in fp32.)

`gradient_checkpointing` full keeps the block's input only (b D), and makes the above again for one block at a time;
selective keeps, beside the input, the output of attention and of every second matrix product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from fastft.config import TrainConfig
from fastft.errors import UserError

GIB = 2**30
FP32 = 4


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
    """What the formulas need of a model."""

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
    """Parameters of everything else: embeddings, last norm, the head unless it is the embeddings."""
    tied: bool
    linears: tuple[Linear, ...]
    """Of one block, in the order of the forward pass."""
    norms_behind: bool
    """Attention and MLP have a norm behind them, too (Gemma 2 and 3)."""
    norms_of_heads: bool
    """Queries and keys have a norm (Qwen 3, Gemma 3)."""
    wide_norms: bool
    """Norms apply their weight in fp32 (Gemma)."""
    softcap: bool
    """Logits go through a tanh (Gemma 2)."""

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
    linears.sort(key=lambda linear: (not linear.in_attention, linear.name == "o_proj"))  # Phi-3 declares it first
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
        norms_behind=len(norms) - len(of_heads) > 2,
        norms_of_heads=bool(of_heads),
        wide_norms=any(kind.startswith("Gemma") for _, kind in norms),
        softcap=bool(getattr(model_config, "final_logit_softcapping", None)),
    )


@dataclass(frozen=True)
class Setup:
    """What the formulas need of a run."""

    gpus: int = 1
    replicas: int = 1
    seq_len: int = 2048
    micro_batch: int = 1
    accumulates: bool = False
    """A step has several micro-batches: gradients are there while the next one's activations are."""
    checkpointing: str = "full"
    moments: float = 2.0 * FP32
    """Bytes of the optimiser's state for a trained parameter."""
    offload: bool = False
    lora_r: int = 0
    lora_targets: str = "all-linear"
    quantized: bool = False
    low: int = 2
    """Bytes of a number in the computation."""
    flash: bool = True
    """Variable-length flash attention, rather than one call for each document."""
    repeated: bool = False
    """Attention keeps keys and values for every query head (varlen before torch 2.12)."""

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


_8BIT_MOMENTS = 2 * (1 + FP32 / 256)  # torchao: a scale in fp32 for 256 numbers


def setup_of(config: TrainConfig, gpus: int, on_gpu: bool = True) -> Setup:
    """The setup of a run on `gpus` processes. Without a GPU: fp32, and attention per document."""
    from fastft.model.attention import varlen_repeats

    moments = {"adamw_8bit": _8BIT_MOMENTS, "float32": 2.0 * FP32, "bfloat16": 4.0}
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
        low=2 if on_gpu else FP32,
        flash=on_gpu and config.attention != "documents",
        repeated=on_gpu and config.attention in ("auto", "varlen") and varlen_repeats(),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of each part at one moment of a step."""

    moment: str
    parameters: float = 0
    """This GPU's shard: trained weights in fp32, frozen ones as computed with."""
    gradients: float = 0
    """The shard's, in fp32."""
    optimiser: float = 0
    gathered: float = 0
    """Whole weights as computed with: embeddings and head, a block at work, and the block behind it."""
    activations: float = 0
    """Kept for the backward pass, of all blocks."""
    working: float = 0
    """What a block's backward pass makes again and holds beside."""
    logits: float = 0
    """A chunk of the loss, and the gradients that it makes."""
    buffers: float = 0
    """Whole gradients on their way to their shards."""

    @property
    def parts(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "moment"}

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def peak_memory(shape: Shape, setup: Setup) -> Memory:
    """The peak of a step, from the second on (the optimiser has state): what torch.cuda.max_memory_allocated counts."""
    return max(_moments(shape, setup), key=lambda memory: memory.total)


# What lasts ----------------------------------------------------------------------------------------------------------------


def trained_in_block(shape: Shape, setup: Setup) -> int:
    """Parameters of a block that are trained."""
    return sum(setup.lora_r * (a.inputs + a.outputs) for a in setup.adapters(shape)) if setup.lora_r else shape.block


def trained_parameters(shape: Shape, setup: Setup) -> int:
    """Parameters that are trained, in the whole model."""
    return shape.layers * trained_in_block(shape, setup) + (0 if setup.lora_r else shape.outside)


def _quantized(shape: Shape, setup: Setup) -> int:
    """Parameters of a block that are kept in 4 bits."""
    return sum(linear.weights for linear in shape.linears) if setup.quantized else 0


def _parameter_bytes(shape: Shape, setup: Setup) -> float:
    # NF4: 4 bits a number, and 8 + 32/256 bits of scale for 64 of them; whole on every GPU
    in_4_bits = shape.layers * _quantized(shape, setup)
    whole = in_4_bits * (4 + (8 + 32 / 256) / 64) / 8
    frozen = shape.parameters - in_4_bits if setup.lora_r else 0
    sharded = FP32 * trained_parameters(shape, setup) + setup.low * frozen
    return whole + (0 if setup.offload else sharded / setup.shards)


# Activations of one block --------------------------------------------------------------------------------------------------


def _norm_bytes(shape: Shape, setup: Setup, width: int, feeds_linear: bool) -> int:
    """What a norm over `width` numbers keeps for a token."""
    normalised = 0 if setup.lora_r else FP32 if shape.wide_norms else setup.low
    return (FP32 + normalised + (setup.low if feeds_linear else 0)) * width


def _norms_bytes(shape: Shape, setup: Setup) -> int:
    """The norms of one half of a block, before and behind attention or MLP, for a token."""
    behind = _norm_bytes(shape, setup, shape.hidden, feeds_linear=False) if shape.norms_behind else 0
    return _norm_bytes(shape, setup, shape.hidden, feeds_linear=True) + behind


def _attention_bytes(shape: Shape, setup: Setup) -> int:
    """What attention keeps for a token, from the rotation to the output projection."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kept = setup.low * (2 * queries + 2 * (queries if setup.repeated else keys)) + FP32 * shape.heads
    if not setup.flash:
        kept += setup.low * queries
    if sum(linear.in_attention for linear in shape.linears) == 2:  # one projection for query, key and value
        kept += setup.low * (queries + keys) + (setup.low * queries if setup.flash else 0)
    if shape.norms_of_heads:
        kept += _norm_bytes(shape, setup, queries + keys, feeds_linear=False)
    return kept


def block_bytes(shape: Shape, setup: Setup) -> int:
    """Everything that a block keeps for a token where nothing is computed again."""
    adapters = setup.low * setup.lora_r * len(setup.adapters(shape))
    mlp = 4 * setup.low * shape.mlp
    return 2 * _norms_bytes(shape, setup) + _attention_bytes(shape, setup) + mlp + adapters


def _selected_bytes(shape: Shape, setup: Setup) -> int:
    """What selective recomputation keeps of a block for a token beside its input: the output of attention, its logsumexp, and
    the first, third, ... matrix product; an adapter brings two.
    """
    r, adapted = setup.lora_r, setup.adapters(shape)
    products = []
    for linear in shape.linears:
        products += [linear.outputs, r, linear.outputs] if linear in adapted else [linear.outputs]
    return setup.low * (shape.heads * shape.head_dim + sum(products[::2])) + FP32 * shape.heads


def kept_bytes(shape: Shape, setup: Setup) -> int:
    """What a block keeps for a token from its forward to its backward pass."""
    if setup.checkpointing == "none":
        return block_bytes(shape, setup)
    selected = _selected_bytes(shape, setup) if setup.checkpointing == "selective" else 0
    return setup.low * shape.hidden + selected


def _gradients_of(linears: Sequence[Linear], shape: Shape, setup: Setup) -> int:
    """Gradients of some linear layers' weights, as computed."""
    if not setup.lora_r:
        return setup.low * sum(linear.weights for linear in linears)
    adapted = setup.adapters(shape)
    return setup.low * setup.lora_r * sum(line.inputs + line.outputs for line in linears if line in adapted)


def _block_backward(shape: Shape, setup: Setup) -> float:
    """The most that a block's backward pass holds beyond what it has kept: what it computes again, gradients of its
    activations, gradients of its weights in the data type of the computation.

    The largest of four places on the way from its end to its beginning. Inside the MLP all that the block needs is there,
    and the gradients of gate, activated gate and up (the product is gone); each norm takes five fp32 copies of its
    input; the kernel of flash attention sums the gradient of the query in fp32, and those of key and value for every head.
    """
    low, hidden = setup.low, shape.hidden
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    of_mlp = [line for line in shape.linears if not line.in_attention]
    of_attention = [line for line in shape.linears if line.in_attention]

    norms, attention = _norms_bytes(shape, setup), _attention_bytes(shape, setup)
    residual = 2 * low * hidden  # the gradient along the residual connection, and through the layer
    in_norm = 5 * FP32 * hidden
    in_attention = low * (2 * queries + 2 * keys) + FP32 * queries + (2 * low * queries if keys < queries else 0)
    inside_mlp = block_bytes(shape, setup) + 2 * low * shape.mlp
    most = max(
        setup.tokens * (inside_mlp + residual) + _gradients_of(of_mlp[-1:], shape, setup),
        setup.tokens * (2 * norms + attention + in_norm + residual) + _gradients_of(of_mlp, shape, setup),
        setup.tokens * (norms + attention + in_attention + residual)
        + _gradients_of(of_mlp + of_attention[-1:], shape, setup),
        setup.tokens * (norms + in_norm + residual) + _gradients_of(shape.linears, shape, setup),
    )
    if setup.quantized:
        most += low * max(line.weights for line in shape.linears)  # one matrix, its 4 bits made numbers again
    # What has been kept is used up, whether the block itself would keep it or not.
    at_hand = {"none": block_bytes(shape, setup), "selective": _selected_bytes(shape, setup), "full": 0}
    return most - setup.tokens * at_hand[setup.checkpointing]


# The step ------------------------------------------------------------------------------------------------------------------


def _logits_bytes(shape: Shape, setup: Setup) -> float:
    """One chunk of the loss: logits as computed and in fp32 (where they become their gradient), the gradient as computed;
    with soft-capping the tanh as well.
    """
    from fastft.model.loss import chunk_positions

    numbers = FP32 + (2 * setup.low if setup.low != FP32 else 0) + (FP32 if shape.softcap else 0)
    return min(chunk_positions(shape.vocabulary), setup.tokens) * shape.vocabulary * numbers


def _moments(shape: Shape, setup: Setup) -> Iterator[Memory]:
    """The moments of a step that can be its peak.

    FSDP2 (torch 2.13): the unit around the blocks stays gathered from its forward to its backward pass. In the forward
    pass the buffer of the last gathering lingers; in the backward pass the next block is gathered while one is at work,
    and the fp32 buffer from which a block's gradients were reduced stays until the next block's. A GPU that shares with
    none gathers nothing, but has the copy in the data type of the computation.

    From block to block activations go and gradients come, by the same amount each time: the first two blocks of the
    backward pass and the last one hold the extremes.
    """
    low, tokens, layers = setup.low, setup.tokens, shape.layers
    of_block = trained_in_block(shape, setup)
    block = low * (shape.block - _quantized(shape, setup) + (of_block if setup.lora_r else 0))
    ahead = block if setup.shards > 1 else 0
    outside = low * shape.outside
    kept = tokens * kept_bytes(shape, setup)
    rotation = 2 * low * tokens * shape.head_dim  # cosine and sine, for all blocks
    head = 0 if setup.lora_r else low * shape.vocabulary * shape.hidden  # its gradient, made with the loss
    sharded = 0 if setup.offload else trained_parameters(shape, setup) / setup.shards
    always = {"parameters": _parameter_bytes(shape, setup), "optimiser": setup.moments * sharded}

    def gradients(blocks_done: int) -> float:
        done = sharded if setup.accumulates else blocks_done * of_block / setup.shards
        return 0 if setup.offload else FP32 * done

    def reduction(count: int) -> float:
        """Gradients copied into one fp32 buffer, and gone before this GPU's shard is made of it; a GPU that shares with
        none divides a copy."""
        alone = FP32 * count if setup.shards == 1 else 0
        return FP32 * count + max(low * count, alone + FP32 * count / setup.shards)

    if setup.shards > 1:
        yield Memory(
            "gathering of the embeddings", **always, gradients=gradients(0), gathered=2 * outside + ahead
        )  # in one buffer, then copied out of it
    last_norm = tokens * _norm_bytes(shape, setup, shape.hidden, feeds_linear=True)
    yield Memory(
        "loss",
        **always,
        gradients=gradients(0),
        gathered=outside + ahead,
        activations=layers * kept + rotation + last_norm,
        logits=_logits_bytes(shape, setup) + 2 * low * tokens * shape.hidden + head,
    )
    for done in sorted({0, min(1, layers - 1), layers - 1}):  # blocks whose backward pass is over
        left = layers - done
        yield Memory(
            f"backward pass of block {left}",
            **always,
            gradients=gradients(done),
            gathered=outside + block + (ahead if left > 1 else 0),
            activations=left * kept + rotation,
            working=_block_backward(shape, setup),
            buffers=head + (FP32 * of_block if done else 0),
        )
        yield Memory(
            f"gradients of block {left}",
            **always,
            gradients=gradients(done),
            gathered=outside + (ahead if left > 1 else 0),
            activations=(left - 1) * kept + rotation,
            buffers=head + reduction(of_block),
        )
    if not setup.lora_r:
        # Tied: the gradients of head and embeddings, and their sum.
        whole = 3 * outside if shape.tied else outside
        buffers = FP32 * of_block + whole
        yield Memory(
            "gradients of the embeddings", **always, gradients=gradients(layers), gathered=outside, buffers=buffers
        )
        yield Memory(
            "reduction of the embeddings", **always, gradients=gradients(layers), buffers=reduction(shape.outside)
        )
    yield Memory("optimiser", **always, gradients=FP32 * sharded)


# Where it does not fit -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relief:
    """A setting that lowers the peak."""

    setting: str
    peak: Memory


def relief(shape: Shape, setup: Setup) -> list[Relief]:
    """Settings that would lower the peak by 1 % or more, each alone, the most helpful first."""
    trained = {"moments": _8BIT_MOMENTS} if setup.moments > _8BIT_MOMENTS else {}
    ideas = [
        ("--gradient_checkpointing full", {"checkpointing": "full"}),
        (f"--micro_batch_size {setup.micro_batch // 2}", {"micro_batch": setup.micro_batch // 2, "accumulates": True}),
        (f"--seq_len {setup.seq_len // 2} --overlong split", {"seq_len": setup.seq_len // 2}),
        ("--optimizer.name adamw_8bit", trained),
        ("--offload true", {"offload": True}),
        (f"{2 * setup.gpus} GPUs", {"gpus": 2 * setup.gpus}),
        ("--lora.quantize nf4", {"quantized": True}) if setup.lora_r else ("--lora.r 16", {"lora_r": 16}),
    ]
    if setup.micro_batch > 1:  # smaller windows cut conversations; smaller batches do not
        del ideas[2]
    else:
        del ideas[1]
    now = peak_memory(shape, setup).total
    found = [Relief(setting, peak_memory(shape, replace(setup, **change))) for setting, change in ideas]
    return sorted((r for r in found if r.peak.total < 0.99 * now), key=lambda r: r.peak.total)


def out_of_memory_line(config: TrainConfig, gpus: int, on_gpu: bool = True) -> str:
    """One line for a run that ran out of memory: what a step needs, and the three settings that help most."""
    from fastft.model.pretrained import fit_config, load_config

    try:
        shape = load_shape(fit_config(load_config(config.model), config, words=0), config.model)
    except UserError as error:
        return f"out of memory; what helps cannot be estimated ({error})"
    setup = setup_of(config, gpus, on_gpu)
    helps = [f"{r.setting} ({r.peak.total / GIB:.1f} GiB)" for r in relief(shape, setup)[:3]]
    what = f"what helps, with its estimate: {', '.join(helps)}" if helps else "no setting of fastft lowers that"
    return f"out of memory: a step is estimated at {peak_memory(shape, setup).total / GIB:.1f} GiB on each GPU; {what}"


def checkpoint_bytes(shape: Shape, config: TrainConfig) -> float:
    """Of a checkpoint: the trained weights in fp32 and the optimiser's moments."""
    setup = setup_of(config, gpus=1)
    return trained_parameters(shape, setup) * (FP32 + setup.moments)
