"""Turn gradients into an update of the weights: optimizer, learning-rate schedule, gradient clipping, skipped steps.

    norm = clip_gradients(model, config.max_grad_norm)
    update(optimizer, learning_rate(config, number, total), finite=norm.isfinite())

Nothing here waits for the device unless its docstring says so. The learning rate is a function of the step's number, so a
checkpoint holds only the weights, the optimizer's moments, and how many steps were skipped.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastft.config import TrainConfig
from fastft.errors import UserError, first_line, is_ours
from fastft.model.attention import torch_version

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build AdamW as `config.optimizer` says: PyTorch's fused one with fp32 or bf16 moments, or torchao's with 8-bit ones.

    Raises UserError if the one that was asked for is not available here.
    """
    groups = parameter_groups(model, config.optimizer.weight_decay)
    if config.optimizer.name == "adamw_8bit":
        return _adamw_8bit(groups, config.optimizer.betas)
    optimizer = torch.optim.AdamW(groups, lr=config.optimizer.lr, betas=config.optimizer.betas, fused=True)
    if config.optimizer.state_dtype == "bfloat16":
        _keep_moments_in_bf16(optimizer)
    return optimizer


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The trained parameters in two groups: matrices and embeddings with weight decay, norms and biases without.

    An empty group is left out. Hugging Face's Trainer, nanoGPT and Megatron-LM do the same; OLMo 2 does not decay the
    embeddings either.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = lambda name, p: p.ndim >= 2 and not name.endswith("bias")  # noqa: E731
    groups = [
        {"params": [p for name, p in trained if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if not decays(name, p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(config: TrainConfig, number: int, total: int) -> float:
    """The learning rate of step `number` in 1..total: a linear warm-up to the peak, then a decay to `schedule.min_ratio` of it.

    `cosine` and `linear` decay from the end of the warm-up; `constant` does not decay. `wsd` (warm-up, stable, decay) decays
    over the last `schedule.decay_ratio` of all steps, as 1 - sqrt(share of the decay that is over). Hägele et al. (2024,
    arXiv 2405.18392) found this better than a linear decay, and as good as cosine if it takes 10 to 20 % of the steps or
    more. The minimum would be reached at step total + 1, so that no step is wasted on a learning rate of 0.
    """
    schedule = config.schedule
    warmup = math.ceil(schedule.warmup_ratio * total)
    if number <= warmup:
        return config.optimizer.lr * number / warmup
    decay = total - warmup
    if schedule.name == "wsd":
        decay = min(decay, math.ceil(schedule.decay_ratio * total))
    done = (number - (total - decay)) / (decay + 1)
    if schedule.name == "constant" or done <= 0:
        return config.optimizer.lr
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "wsd": 1 - math.sqrt(done)}
    return config.optimizer.lr * (schedule.min_ratio + (1 - schedule.min_ratio) * shape[schedule.name])


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients of all shards down to a total norm of at most `max_norm`; collective.

    0 means no limit. Returns the norm before clipping, a scalar on the device that is the same on every rank.
    """
    trained = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm


def update(optimizer: torch.optim.Optimizer, lr: float, finite: Tensor) -> None:
    """Take one step at `lr` unless `finite`, a bool scalar on the device, is false, and drop the gradients.

    After a step that is not finite, the weights, the moments and the optimizer's count of steps are what they were. The fused
    kernels decide this on the device, by an input that is meant for mixed precision (`found_inf`). torchao's 8-bit kernel has
    no such input, so with it the host waits for `finite` at every step.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = 1.0 - finite.float()
        optimizer.step()
        del optimizer.found_inf
    elif finite:
        optimizer.step()
    optimizer.zero_grad()


@dataclass
class SkippedSteps:
    """Counts the steps that were skipped because their loss or gradient was not finite, up to the latest row of metrics."""

    total: int = 0
    in_a_row: int = 0

    def count(self, row: dict) -> None:
        """Count the step described by `row`, and set row["skipped_steps"] to the number skipped so far."""
        finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        self.total += not finite
        self.in_a_row = 0 if finite else self.in_a_row + 1
        row["skipped_steps"] = self.total


def _keep_moments_in_bf16(optimizer: torch.optim.AdamW) -> None:
    """Keep the moments in bf16 between steps, which halves their memory (DeepSeek-V3, arXiv 2412.19437, 3.3.2).

    The weights and the arithmetic stay fp32. On GPUs PyTorch's fused kernel takes bf16 moments with fp32 weights and
    gradients (torch >= 2.13). The CPU's kernel takes one data type only, so there the moments are widened to fp32 for each
    step, which gives the same numbers but saves no memory during the step. After a checkpoint was loaded they are fp32, too,
    until the next step.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if torch_version() < (2, 13) and any(p.device.type == "cuda" for p in parameters):
        raise UserError(
            f"optimizer.state_dtype: bfloat16 needs torch 2.13 or newer on a GPU, this is {torch.__version__}; use float32"
        )

    def widen(optimizer: torch.optim.AdamW, args, kwargs) -> None:
        for p in parameters:
            state, dtype = optimizer.state[p], torch.bfloat16 if p.device.type == "cuda" else torch.float32
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state.update({name: torch.zeros_like(p, dtype=dtype) for name in MOMENTS})
            state.update({name: state[name].to(dtype) for name in MOMENTS})

    def narrow(optimizer: torch.optim.AdamW, args, kwargs) -> None:
        for p in parameters:
            state = optimizer.state[p]
            state.update({name: state[name].to(torch.bfloat16) for name in MOMENTS})

    optimizer.register_step_pre_hook(widen)
    optimizer.register_step_post_hook(narrow)


def _adamw_8bit(groups: list[dict], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Build torchao's AdamW with 8-bit moments, in blocks of 256 that share a scale (Dettmers et al., 2022).

    Shards with fewer than 4,096 entries, or whose number of entries is not a multiple of 256, keep fp32 moments. A step with
    zero gradients and a learning rate of 0 is taken here, because it creates the moments and compiles a kernel for each
    shape. Raises UserError if torchao is missing or cannot compile.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError(
            'optimizer.name: adamw_8bit needs torchao, which is not installed (pip install "fastft[torchao]"); use adamw'
        ) from None
    optimizer = AdamW8bit(groups, lr=0.0, betas=betas)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    try:
        optimizer.step()
    except Exception as error:  # torch.compile without a C++ compiler, or without Triton
        if is_ours(error):
            raise
        reason = first_line(error)
        raise UserError(f"optimizer.name: adamw_8bit cannot be compiled here ({reason}); use adamw") from None
    for state in optimizer.state.values():
        state["step"].zero_()
    optimizer.zero_grad()
    return optimizer
