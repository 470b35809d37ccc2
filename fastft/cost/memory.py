"""The memory that a training step takes on each GPU, part by part, from the model's config alone.

    shape = load_shape(load_config(config.model), config.model)     # parameters counted on the meta device; no weights
    peak = peak_memory(shape, setup_of(config, gpus=8))             # a Memory: bytes of each part at the step's peak
    relief(shape, setup_of(config, gpus=8))                         # settings that lower it, the most helpful first

Everything is counted and nothing is fitted. The parameters come from the model's own modules, the rest from what FSDP2,
autograd and the loss hold in each phase of a step that can be its peak (`_phases`). benchmarks/memory.py and the tests
compare the result with the tensors of real steps. Units are bytes, for one GPU, unless a name says otherwise.

What one block keeps for its backward pass, in bytes a token
------------------------------------------------------------
D is the hidden size, F the feed-forward width, H the number of query heads, K the number of key-value heads, and d the size
of a head. b is the size of a number in the computation: 2 bytes on GPUs (bf16, with master weights in fp32), 4 on a CPU
(fp32). The counts hold for the eager modules of transformers 5.23; torch.compile keeps less.

- RMSNorm of Llama, Mistral, Qwen and Phi-3: `x.to(float32)`, which the square and the product need (4 D); the normalised x
  in the data type of the computation, for the gradient of the weight (b D); the product with the weight, which the linear
  layers after it need (b D).
- RMSNorm of Gemma: the weight is applied in fp32, so the normalised x is kept in fp32 (4 D) beside the copy (4 D).
- Norms after attention and MLP (Gemma 2 and 3): as above, but the result is not kept, because it is only added.
- Norms of query and key (Qwen 3, Gemma 3): as above over (H + K) d entries; the result is not kept here either.
- Flash attention: query and key after their rotation, value and output, b d (2 H + 2 K), and a logsumexp, 4 H. The
  rotation keeps only cosine and sine, which all blocks share.
- Attention of Phi-3, which projects query, key and value in one product: the value is a view of that product and keeps
  all of it alive, b d (H + K) more. The rotation leaves the heads in another order, so the output is copied for the
  projection after it, b d H more.
- varlen before torch 2.12: keys and values are repeated for every query head, so H takes the place of K.
- Attention for each conversation (`documents`): the outputs are joined into one more tensor, b d H more.
- SwiGLU and GeGLU: gate, activated gate, up, and the product of the last two, 4 b F.
- LoRA: norms and linear layers are frozen, so a norm keeps no normalised x, but every adapter keeps its r inner values, b r.

Llama-2-7B (D 4096, F 11008, H = K = 32, d 128), bf16: 65,536 for the norms, 32,896 for attention, 88,064 for the MLP:
186,496 bytes a token and block. (Korthikanti et al., 2022, count 34 D = 139,264 for a GPT block, whose norms make no copy
in fp32.)

`gradient_checkpointing: full` keeps only the block's input (b D) and computes the above again, one block at a time.
`selective` also keeps the outputs of attention and of every second matrix product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from fastft.config import TrainConfig
from fastft.cost.shape import FP32, MOMENTS_8BIT, Linear, Setup, Shape, load_shape, setup_of
from fastft.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of each part in one phase of a step."""

    phase: str
    parameters: float = 0
    """This GPU's shard of the weights: trained ones in fp32, frozen ones in the data type of the computation."""
    gradients: float = 0
    """The gradients of that shard, in fp32."""
    optimizer: float = 0
    """The optimizer's state for that shard."""
    gathered: float = 0
    """Whole weights in the data type of the computation: embeddings, head, the current block, and the block gathered ahead."""
    activations: float = 0
    """Activations of all blocks that are kept for the backward pass."""
    working: float = 0
    """What the backward pass of the current block holds beyond its kept activations, recomputed ones included."""
    logits: float = 0
    """A chunk of the loss's logits, and their gradients."""
    buffers: float = 0
    """Whole gradients on their way to the shards."""

    @property
    def parts(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "phase"}

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def peak_memory(shape: Shape, setup: Setup) -> Memory:
    """The memory at the peak of a step, as torch.cuda.max_memory_allocated counts it.

    It holds from the second step on; in the first the optimizer has no state yet.
    """
    return max(_phases(shape, setup), key=lambda memory: memory.total)


# Weights -------------------------------------------------------------------------------------------------------------------


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
    """Bytes of the weights on this GPU.

    An NF4 weight takes 4 bits, and 64 of them share 8 + 32/256 bits of scale. Every GPU holds all NF4 weights; all others are
    sharded.
    """
    in_4_bits = shape.layers * _quantized(shape, setup)
    on_every_gpu = in_4_bits * (4 + (8 + 32 / 256) / 64) / 8
    frozen = shape.parameters - in_4_bits if setup.lora_r else 0
    sharded = FP32 * trained_parameters(shape, setup) + setup.itemsize * frozen
    return on_every_gpu + (0 if setup.offload else sharded / setup.shards)


# Activations of one block --------------------------------------------------------------------------------------------------


def _norm_bytes(shape: Shape, setup: Setup, width: int, feeds_linear: bool) -> int:
    """Bytes that a norm over `width` entries keeps for a token; its result is kept only if it `feeds_linear` layers."""
    normalised = 0 if setup.lora_r else FP32 if shape.wide_norms else setup.itemsize
    return (FP32 + normalised + (setup.itemsize if feeds_linear else 0)) * width


def _norms_bytes(shape: Shape, setup: Setup) -> int:
    """Bytes that the norms of one half of a block keep for a token: those around attention, or those around the MLP."""
    after = _norm_bytes(shape, setup, shape.hidden, feeds_linear=False) if shape.post_norms else 0
    return _norm_bytes(shape, setup, shape.hidden, feeds_linear=True) + after


def _attention_bytes(shape: Shape, setup: Setup) -> int:
    """Bytes that attention keeps for a token, from the rotation to the output projection."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kept = setup.itemsize * (2 * queries + 2 * (queries if setup.repeats_kv else keys)) + FP32 * shape.heads
    if not setup.flash:
        kept += setup.itemsize * queries
    if sum(linear.in_attention for linear in shape.linears) == 2:  # one projection for query, key and value
        kept += setup.itemsize * (queries + keys) + (setup.itemsize * queries if setup.flash else 0)
    if shape.qk_norms:
        kept += _norm_bytes(shape, setup, queries + keys, feeds_linear=False)
    return kept


def block_bytes(shape: Shape, setup: Setup) -> int:
    """Bytes that a block keeps for a token without gradient checkpointing."""
    adapters = setup.itemsize * setup.lora_r * len(setup.adapters(shape))
    mlp = 4 * setup.itemsize * shape.mlp
    return 2 * _norms_bytes(shape, setup) + _attention_bytes(shape, setup) + mlp + adapters


def _selected_bytes(shape: Shape, setup: Setup) -> int:
    """Bytes that selective gradient checkpointing keeps of a block for a token, besides the block's input.

    It keeps the output of attention with its logsumexp, and the results of the first, third, fifth, … matrix product. An
    adapter adds two products to those of its layer.
    """
    r, adapted = setup.lora_r, setup.adapters(shape)
    products = []
    for linear in shape.linears:
        products += [linear.outputs, r, linear.outputs] if linear in adapted else [linear.outputs]
    return setup.itemsize * (shape.heads * shape.head_dim + sum(products[::2])) + FP32 * shape.heads


def kept_bytes(shape: Shape, setup: Setup) -> int:
    """Bytes that a block keeps for a token from its forward to its backward pass."""
    if setup.checkpointing == "none":
        return block_bytes(shape, setup)
    selected = _selected_bytes(shape, setup) if setup.checkpointing == "selective" else 0
    return setup.itemsize * shape.hidden + selected


def _gradients_of(linears: Sequence[Linear], shape: Shape, setup: Setup) -> int:
    """Bytes of the gradients of these linear layers' weights, in the data type of the computation."""
    if not setup.lora_r:
        return setup.itemsize * sum(linear.weights for linear in linears)
    adapted = setup.adapters(shape)
    return (
        setup.itemsize * setup.lora_r * sum(linear.inputs + linear.outputs for linear in linears if linear in adapted)
    )


def _block_backward(shape: Shape, setup: Setup) -> float:
    """The most bytes that a block's backward pass holds beyond what was kept from its forward pass.

    It holds the block's activations (computed again where they were not kept), their gradients, and the gradients of the
    weights in the data type of the computation. The most of this is there in one of four places between the block's end and
    its beginning: inside the MLP, in the norm before it, in attention, or in the norm before that.
    """
    itemsize, hidden = setup.itemsize, shape.hidden
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    of_mlp = [linear for linear in shape.linears if not linear.in_attention]
    of_attention = [linear for linear in shape.linears if linear.in_attention]

    norms, attention = _norms_bytes(shape, setup), _attention_bytes(shape, setup)
    # The gradients of gate, activated gate and up, less the product of the last two, which is freed.
    in_mlp = 2 * itemsize * shape.mlp
    in_norm = 5 * FP32 * hidden  # copies of its input
    # Flash attention's kernel sums the query's gradient in fp32, and those of key and value for every query head.
    in_attention = (
        itemsize * (2 * queries + 2 * keys) + FP32 * queries + (2 * itemsize * queries if keys < queries else 0)
    )
    places = [  # bytes a token, and the linear layers whose weights have gradients by then
        (block_bytes(shape, setup) + in_mlp, of_mlp[-1:]),
        (2 * norms + attention + in_norm, of_mlp),
        (norms + attention + in_attention, of_mlp + of_attention[-1:]),
        (norms + in_norm, shape.linears),
    ]
    residual = 2 * itemsize * hidden  # the gradient along the residual connection, and the one through the layer
    most = max(setup.tokens * (held + residual) + _gradients_of(done, shape, setup) for held, done in places)
    if setup.quantized:
        most += itemsize * max(linear.weights for linear in shape.linears)  # one matrix at a time is dequantized
    kept = {"none": block_bytes(shape, setup), "selective": _selected_bytes(shape, setup), "full": 0}
    return most - setup.tokens * kept[setup.checkpointing]


# The step ------------------------------------------------------------------------------------------------------------------


def _logits_bytes(shape: Shape, setup: Setup) -> float:
    """Bytes of one chunk of the loss.

    It holds the logits and their gradient in the data type of the computation, and the logits once more in fp32, which are
    overwritten by their gradient. With soft-capping it also keeps the tanh.
    """
    from fastft.model.loss import chunk_positions

    numbers = FP32 + (2 * setup.itemsize if setup.itemsize != FP32 else 0) + (FP32 if shape.softcap else 0)
    return min(chunk_positions(shape.vocabulary), setup.tokens) * shape.vocabulary * numbers


def _phases(shape: Shape, setup: Setup) -> Iterator[Memory]:
    """The phases of a step that can be its peak, in their order.

    From block to block of the backward pass, activations are freed and gradients are added, by the same amounts each time. So
    only its first two blocks and its last one can be the peak.
    """
    step, layers = _StepPhases(shape, setup), shape.layers
    yield from step.forward_pass()
    for blocks_done in sorted({0, min(1, layers - 1), layers - 1}):
        yield from step.backward_pass(blocks_done)
    if not setup.lora_r:
        yield from step.embeddings()
    yield step.memory("optimizer", gradients=FP32 * step.sharded)


class _StepPhases:
    """The phases of a step under FSDP2 (torch 2.13), and the sizes that they share.

    The unit around the blocks, with the embeddings and the head, stays gathered from its forward to its backward pass. The
    next block is gathered while the current one computes: `ahead`. On a single GPU nothing is gathered, but it holds a copy
    of the weights in the data type of the computation.
    """

    def __init__(self, shape: Shape, setup: Setup):
        itemsize = setup.itemsize
        self.shape, self.setup = shape, setup
        self.trained = trained_in_block(shape, setup)
        self.block = itemsize * (shape.block - _quantized(shape, setup) + (self.trained if setup.lora_r else 0))
        self.ahead = self.block if setup.shards > 1 else 0
        self.outside = itemsize * shape.outside
        self.kept = setup.tokens * kept_bytes(shape, setup)
        self.rotation = 2 * itemsize * setup.tokens * shape.head_dim  # cosine and sine, for all blocks
        self.head_gradient = 0 if setup.lora_r else itemsize * shape.vocabulary * shape.hidden  # made with the loss
        self.sharded = 0 if setup.offload else trained_parameters(shape, setup) / setup.shards  # a number of parameters

    def forward_pass(self) -> Iterator[Memory]:
        """The phases of the forward pass: the gathering of the first unit, and the loss, when all activations are there."""
        shape, setup = self.shape, self.setup
        if setup.shards > 1:  # gathered into one buffer, and then copied out of it
            yield self.memory("gathering of the embeddings", gathered=2 * self.outside + self.ahead)
        last_norm = setup.tokens * _norm_bytes(shape, setup, shape.hidden, feeds_linear=True)
        yield self.memory(
            "loss",
            gathered=self.outside + self.ahead,  # the buffer of the last block's gathering is still there
            activations=shape.layers * self.kept + self.rotation + last_norm,
            logits=_logits_bytes(shape, setup) + 2 * setup.itemsize * setup.tokens * shape.hidden + self.head_gradient,
        )

    def backward_pass(self, blocks_done: int) -> Iterator[Memory]:
        """The phases of the next block's backward pass, after `blocks_done`, and of the reduction of its gradients.

        The fp32 buffer from which a block's gradients were reduced stays until the next block's gradients need one.
        """
        left = self.shape.layers - blocks_done
        ahead = self.ahead if left > 1 else 0
        yield self.memory(
            f"backward pass of block {left}",
            blocks_done,
            gathered=self.outside + self.block + ahead,
            activations=left * self.kept + self.rotation,
            working=_block_backward(self.shape, self.setup),
            buffers=self.head_gradient + (FP32 * self.trained if blocks_done else 0),
        )
        yield self.memory(
            f"gradients of block {left}",
            blocks_done,
            gathered=self.outside + ahead,
            activations=(left - 1) * self.kept + self.rotation,
            buffers=self.head_gradient + self._reduction(self.trained),
        )

    def embeddings(self) -> Iterator[Memory]:
        """The phases after the last block: the gradients of embeddings and head, and their reduction."""
        layers = self.shape.layers
        # Tied weights have a gradient from the head, one from the embeddings, and the sum of the two.
        gradients = 3 * self.outside if self.shape.tied else self.outside
        buffers = FP32 * self.trained + gradients
        yield self.memory("gradients of the embeddings", layers, gathered=self.outside, buffers=buffers)
        yield self.memory("reduction of the embeddings", layers, buffers=self._reduction(self.shape.outside))

    def memory(self, phase: str, blocks_done: int = 0, **parts: float) -> Memory:
        """The memory of a phase: `parts`, the weights, the optimizer's state, and the gradients of the blocks that are done."""
        setup = self.setup
        with_gradients = self.sharded if setup.accumulates else blocks_done * self.trained / setup.shards
        always = {
            "parameters": _parameter_bytes(self.shape, setup),
            "optimizer": setup.moments * self.sharded,
            "gradients": 0 if setup.offload else FP32 * with_gradients,
        }
        return Memory(phase, **{**always, **parts})

    def _reduction(self, count: int) -> float:
        """Bytes of the gradients of `count` parameters while they are reduced to this GPU's shard.

        They are copied into one fp32 buffer, and are freed before the shard is made. A single GPU divides a copy of the buffer.
        """
        divided = FP32 * count if self.setup.shards == 1 else 0
        return FP32 * count + max(self.setup.itemsize * count, divided + FP32 * count / self.setup.shards)


# Where it does not fit -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relief:
    """A setting that lowers the peak, and the peak with it."""

    setting: str
    peak: Memory


def relief(shape: Shape, setup: Setup) -> list[Relief]:
    """The settings that alone would lower the peak by at least 1 %, the most helpful first."""
    moments = {"moments": MOMENTS_8BIT} if setup.moments > MOMENTS_8BIT else {}
    if setup.micro_batch > 1:  # rather fewer rows than shorter ones, which would cut conversations
        half = setup.micro_batch // 2
        fewer_tokens = (f"--micro_batch_size {half}", {"micro_batch": half, "accumulates": True})
    else:
        half = setup.seq_len // 2
        fewer_tokens = (f"--seq_len {half} --overlong split", {"seq_len": half})
    ideas = [
        ("--gradient_checkpointing full", {"checkpointing": "full"}),
        fewer_tokens,
        ("--optimizer.name adamw_8bit", moments),
        ("--offload true", {"offload": True}),
        (f"{2 * setup.gpus} GPUs", {"gpus": 2 * setup.gpus}),
        ("--lora.quantize nf4", {"quantized": True}) if setup.lora_r else ("--lora.r 16", {"lora_r": 16}),
    ]
    now = peak_memory(shape, setup).total
    found = [Relief(setting, peak_memory(shape, replace(setup, **change))) for setting, change in ideas]
    return sorted((r for r in found if r.peak.total < 0.99 * now), key=lambda r: r.peak.total)


def out_of_memory_line(config: TrainConfig, gpus: int) -> str:
    """The error of a run that is out of memory, in one line: what a step needs, and the three settings that help most."""
    from fastft.model.pretrained import fit_config, load_config

    try:
        shape = load_shape(fit_config(load_config(config.model), config, vocabulary=0), config.model)
    except UserError as error:
        return f"out of memory; what helps cannot be estimated ({error})"
    setup = setup_of(config, gpus)
    helps = [f"{r.setting} ({r.peak.total / GIB:.1f} GiB)" for r in relief(shape, setup)[:3]]
    what = f"what helps, with its estimate: {', '.join(helps)}" if helps else "no setting of fastft lowers that"
    return f"out of memory: a step is estimated at {peak_memory(shape, setup).total / GIB:.1f} GiB on each GPU; {what}"


def checkpoint_bytes(shape: Shape, config: TrainConfig) -> float:
    """The size of a checkpoint: the trained weights in fp32 and the optimizer's moments."""
    setup = setup_of(config, gpus=1)
    return trained_parameters(shape, setup) * (FP32 + setup.moments)
