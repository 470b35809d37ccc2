"""The memory that a training step takes on each GPU, part by part, from the model's config alone.

    shape = load_shape(load_config(config.model), config.model)     # parameters counted on the meta device; no weights
    peak = peak_memory(shape, setup_of(config, gpus=8))             # a Memory: bytes of each part at the step's peak
    relief(shape, setup_of(config, gpus=8))                         # settings that lower it, the most helpful first

Everything is counted and nothing is fitted: parameters from the model's own modules, the rest from what FSDP2, autograd and
the loss hold at the moments that can be a step's peak (`_moments`). benchmarks/memory.py and the tests compare it with the
tensors of real steps. Units are bytes, for one GPU, unless a name says otherwise.

What one block keeps for its backward pass, in bytes a token
------------------------------------------------------------
D is the hidden size, F the feed-forward width, H and K are the numbers of query heads and key-value heads of d entries, and
b is the bytes of a number in the computation (2: bf16 on GPUs, with master weights in fp32; 4: fp32 on a CPU). This holds for
the eager modules of transformers 5.23; torch.compile keeps less.

- RMSNorm of Llama, Mistral, Qwen and Phi-3: `x.to(float32)`, which the square and the product need (4 D); the normalised x
  in the data type of the computation, for the gradient of the weight (b D); the product with the weight, which the linear
  layers after it need (b D).
- RMSNorm of Gemma: the weight is applied in fp32, so the normalised x is kept in fp32 (4 D) beside the copy (4 D).
- Norms after attention and MLP (Gemma 2 and 3): the same without the result, which is added and not multiplied.
- Norms of query and key (Qwen 3, Gemma 3): the same over (H + K) d entries, again without the result.
- Flash attention: query and key after their rotation, value and output: b d (2 H + 2 K), and a logsumexp, 4 H. The
  rotation keeps nothing but cosine and sine, which all blocks share. Phi-3 projects query, key and value in one product:
  the value is a view that keeps all of it, b d (H + K) more, and its rotation leaves the heads in an order in which the
  output has to be copied for the projection after it, b d H more.
- varlen before torch 2.12 repeats keys and values for every query head: H instead of K.
- Attention for each conversation (`documents`): the parts are joined into a tensor of their own, b d H more.
- SwiGLU and GeGLU: gate, activated gate, up, and the product of the last two: 4 b F.
- LoRA freezes norms and linear layers: a norm keeps no normalised x, but every adapter keeps its r inner values (b r).

Llama-2-7B (D 4096, F 11008, H = K = 32, d 128), bf16: 65,536 for the norms, 32,896 for attention, 88,064 for the MLP:
186,496 bytes a token and block. (Korthikanti et al., 2022, count 34 D = 139,264 for a GPT block, whose norms make no copy
in fp32.)

`gradient_checkpointing: full` keeps only the block's input (b D) and computes the above again for one block at a time;
selective also keeps the outputs of attention and of every second matrix product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from fastft.config import TrainConfig
from fastft.cost.shape import FP32, MOMENTS_8BIT, Linear, Setup, Shape, load_shape, setup_of
from fastft.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of each part at one moment of a step."""

    moment: str
    parameters: float = 0
    """This GPU's shard of the weights: trained ones in fp32, frozen ones in the data type of the computation."""
    gradients: float = 0
    """The gradients of that shard, in fp32."""
    optimizer: float = 0
    """The optimizer's state for that shard."""
    gathered: float = 0
    """Whole weights in the data type of the computation: embeddings and head, the block at work, and the one gathered ahead."""
    activations: float = 0
    """Activations of all blocks that are kept for the backward pass."""
    working: float = 0
    """What the backward pass of the block at work computes again, and holds in addition."""
    logits: float = 0
    """A chunk of the loss's logits, and their gradients."""
    buffers: float = 0
    """Whole gradients on their way to the shards."""

    @property
    def parts(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "moment"}

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def peak_memory(shape: Shape, setup: Setup) -> Memory:
    """The peak of a step from the second on, when the optimizer has state: what torch.cuda.max_memory_allocated counts."""
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
    """The weights of this GPU. In NF4 a number takes 4 bits, and 64 of them 8 + 32/256 bits of scale; they are not sharded."""
    in_4_bits = shape.layers * _quantized(shape, setup)
    whole = in_4_bits * (4 + (8 + 32 / 256) / 64) / 8
    frozen = shape.parameters - in_4_bits if setup.lora_r else 0
    sharded = FP32 * trained_parameters(shape, setup) + setup.low * frozen
    return whole + (0 if setup.offload else sharded / setup.shards)


# Activations of one block --------------------------------------------------------------------------------------------------


def _norm_bytes(shape: Shape, setup: Setup, width: int, feeds_linear: bool) -> int:
    """What a norm over `width` numbers keeps for a token; `feeds_linear`: its result is kept, too, for the layers after it."""
    normalised = 0 if setup.lora_r else FP32 if shape.wide_norms else setup.low
    return (FP32 + normalised + (setup.low if feeds_linear else 0)) * width


def _norms_bytes(shape: Shape, setup: Setup) -> int:
    """What the norms of one half of a block keep for a token: those before and after attention, or the MLP."""
    after = _norm_bytes(shape, setup, shape.hidden, feeds_linear=False) if shape.post_norms else 0
    return _norm_bytes(shape, setup, shape.hidden, feeds_linear=True) + after


def _attention_bytes(shape: Shape, setup: Setup) -> int:
    """What attention keeps for a token, from the rotation to the output projection."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kept = setup.low * (2 * queries + 2 * (queries if setup.repeated else keys)) + FP32 * shape.heads
    if not setup.flash:
        kept += setup.low * queries
    if sum(linear.in_attention for linear in shape.linears) == 2:  # one projection for query, key and value
        kept += setup.low * (queries + keys) + (setup.low * queries if setup.flash else 0)
    if shape.qk_norms:
        kept += _norm_bytes(shape, setup, queries + keys, feeds_linear=False)
    return kept


def block_bytes(shape: Shape, setup: Setup) -> int:
    """What a block keeps for a token without gradient checkpointing."""
    adapters = setup.low * setup.lora_r * len(setup.adapters(shape))
    mlp = 4 * setup.low * shape.mlp
    return 2 * _norms_bytes(shape, setup) + _attention_bytes(shape, setup) + mlp + adapters


def _selected_bytes(shape: Shape, setup: Setup) -> int:
    """What selective gradient checkpointing keeps of a block for a token, besides the block's input.

    The output of attention, its logsumexp, and the first, third, fifth, ... matrix product; an adapter brings two products.
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
    """Bytes of the gradients of these linear layers' weights, in the data type of the computation."""
    if not setup.lora_r:
        return setup.low * sum(linear.weights for linear in linears)
    adapted = setup.adapters(shape)
    return setup.low * setup.lora_r * sum(line.inputs + line.outputs for line in linears if line in adapted)


def _block_backward(shape: Shape, setup: Setup) -> float:
    """The most that a block's backward pass holds in addition to what was kept from its forward pass.

    That is what it computes again, the gradients of its activations, and those of its weights in the data type of the
    computation, at the largest of four places on the way from the block's end to its beginning. Inside the MLP everything
    that the block needs is there, and the gradients of gate, activated gate and up (the product is gone). Each norm takes
    five fp32 copies of its input. The kernel of flash attention sums the gradient of the query in fp32, and those of key and
    value for every head.
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
        most += low * max(line.weights for line in shape.linears)  # one matrix at a time, dequantised
    # What was kept from the forward pass is counted there already.
    kept = {"none": block_bytes(shape, setup), "selective": _selected_bytes(shape, setup), "full": 0}
    return most - setup.tokens * kept[setup.checkpointing]


# The step ------------------------------------------------------------------------------------------------------------------


def _logits_bytes(shape: Shape, setup: Setup) -> float:
    """One chunk of the loss: its logits and their gradient in the data type of the computation, and the logits in fp32.

    (The fp32 logits are overwritten by their gradient.) With soft-capping the tanh is kept as well.
    """
    from fastft.model.loss import chunk_positions

    numbers = FP32 + (2 * setup.low if setup.low != FP32 else 0) + (FP32 if shape.softcap else 0)
    return min(chunk_positions(shape.vocabulary), setup.tokens) * shape.vocabulary * numbers


def _moments(shape: Shape, setup: Setup) -> Iterator[Memory]:
    """The moments of a step that can be its peak.

    In FSDP2 (torch 2.13) the unit around the blocks stays gathered from its forward to its backward pass. In the forward
    pass the buffer of the last gathering lingers. In the backward pass the next block is gathered while one is at work, and
    the fp32 buffer from which a block's gradients were reduced stays until the next block's. A single GPU gathers nothing,
    but holds the copy in the data type of the computation.

    From block to block of the backward pass, activations are freed and gradients are added, by the same amount each time, so
    that only its first two blocks and its last one can be the peak.
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
    always = {"parameters": _parameter_bytes(shape, setup), "optimizer": setup.moments * sharded}

    def gradients(blocks_done: int) -> float:
        done = sharded if setup.accumulates else blocks_done * of_block / setup.shards
        return 0 if setup.offload else FP32 * done

    def reduction(count: int) -> float:
        """Gradients of `count` parameters while they are copied into one fp32 buffer and reduced to this GPU's shard.

        The gradients themselves are gone before the shard is made; a single GPU divides a copy of the buffer.
        """
        alone = FP32 * count if setup.shards == 1 else 0
        return FP32 * count + max(low * count, alone + FP32 * count / setup.shards)

    if setup.shards > 1:
        yield Memory(
            # Gathered into one buffer, then copied out of it.
            "gathering of the embeddings",
            **always,
            gradients=gradients(0),
            gathered=2 * outside + ahead,
        )
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
        whole = 3 * outside if shape.tied else outside  # tied: the gradients of head and embeddings, and their sum
        buffers = FP32 * of_block + whole
        yield Memory(
            "gradients of the embeddings", **always, gradients=gradients(layers), gathered=outside, buffers=buffers
        )
        yield Memory(
            "reduction of the embeddings", **always, gradients=gradients(layers), buffers=reduction(shape.outside)
        )
    yield Memory("optimizer", **always, gradients=FP32 * sharded)


# Where it does not fit -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relief:
    """A setting that lowers the peak, and the peak with it."""

    setting: str
    peak: Memory


def relief(shape: Shape, setup: Setup) -> list[Relief]:
    """Settings each of which alone would lower the peak by 1 % or more, the most helpful first."""
    trained = {"moments": MOMENTS_8BIT} if setup.moments > MOMENTS_8BIT else {}
    ideas = [
        ("--gradient_checkpointing full", {"checkpointing": "full"}),
        (f"--micro_batch_size {setup.micro_batch // 2}", {"micro_batch": setup.micro_batch // 2, "accumulates": True}),
        (f"--seq_len {setup.seq_len // 2} --overlong split", {"seq_len": setup.seq_len // 2}),
        ("--optimizer.name adamw_8bit", trained),
        ("--offload true", {"offload": True}),
        (f"{2 * setup.gpus} GPUs", {"gpus": 2 * setup.gpus}),
        ("--lora.quantize nf4", {"quantized": True}) if setup.lora_r else ("--lora.r 16", {"lora_r": 16}),
    ]
    if setup.micro_batch > 1:  # shorter rows cut conversations; smaller batches do not
        del ideas[2]
    else:
        del ideas[1]
    now = peak_memory(shape, setup).total
    found = [Relief(setting, peak_memory(shape, replace(setup, **change))) for setting, change in ideas]
    return sorted((r for r in found if r.peak.total < 0.99 * now), key=lambda r: r.peak.total)


def out_of_memory_line(config: TrainConfig, gpus: int, on_gpu: bool = True) -> str:
    """One line for a run that has run out of memory: what a step needs, and the three settings that help most."""
    from fastft.model.pretrained import fit_config, load_config

    try:
        shape = load_shape(fit_config(load_config(config.model), config, vocabulary=0), config.model)
    except UserError as error:
        return f"out of memory; what helps cannot be estimated ({error})"
    setup = setup_of(config, gpus, on_gpu)
    helps = [f"{r.setting} ({r.peak.total / GIB:.1f} GiB)" for r in relief(shape, setup)[:3]]
    what = f"what helps, with its estimate: {', '.join(helps)}" if helps else "no setting of fastft lowers that"
    return f"out of memory: a step is estimated at {peak_memory(shape, setup).total / GIB:.1f} GiB on each GPU; {what}"


def checkpoint_bytes(shape: Shape, config: TrainConfig) -> float:
    """The size of a checkpoint: the trained weights in fp32 and the optimizer's moments."""
    setup = setup_of(config, gpus=1)
    return trained_parameters(shape, setup) * (FP32 + setup.moments)
