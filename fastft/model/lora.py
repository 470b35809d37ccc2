"""LoRA and QLoRA: adds peft's adapters to frozen weights, gives them their first values, and merges them for the export.

The adapters are injected into transformers' model, which keeps its class and its module tree. A linear layer with an adapter
has the parameters `….base_layer.weight` (frozen), `….lora_A.default.weight` [r, in] and `….lora_B.default.weight` [out, r],
and computes base(x) + alpha / r * B A x.
"""

import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from fastft.config import LoraConfig
from fastft.errors import UserError, is_ours
from fastft.model.weights import Read, gather


def add_adapters(
    causal_lm: nn.Module, blocks: nn.ModuleList, config: LoraConfig, model: str, dtype: torch.dtype
) -> None:
    """Freeze `causal_lm` and inject adapters; both are on the meta device, without values.

    With nf4, the linear layers of `blocks` become bitsandbytes' 4-bit layers, which compute in `dtype`. Raises UserError if a
    library is missing, or if a target is not a linear layer of the model.
    """
    peft = _peft()
    if config.quantize == "nf4":
        _make_quantized(blocks, dtype)
        causal_lm.is_loaded_in_4bit = True  # peft looks for this attribute
    settings = adapter_settings(blocks, config, model)
    peft.inject_adapter_in_model(settings, causal_lm, low_cpu_mem_usage=True)
    for name, parameter in causal_lm.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def adapter_settings(blocks: nn.ModuleList, config: LoraConfig, model: str):
    """peft's config of the adapters, which is saved with them. Raises UserError as `add_adapters` does."""
    linear = sorted({n.rpartition(".")[2] for n, module in blocks.named_modules() if isinstance(module, nn.Linear)})
    targets = linear if config.targets == "all-linear" else [t.strip() for t in config.targets.split(",") if t.strip()]
    if not linear or not set(targets) <= set(linear):
        raise UserError(
            f"lora.targets: {config.targets} is not among the linear layers of the model's blocks ({', '.join(linear) or 'none'})"
        )
    return _peft().LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model,
    )


def _peft():
    try:
        import peft
    except ImportError:
        raise UserError('lora.r: peft is not installed (pip install "fastft[lora]")') from None
    return peft


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def plain_name(name: str) -> str:
    """The name of a frozen parameter in the model without adapters."""
    return name.replace(".base_layer.", ".")


def start(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The first values of an adapter, as in peft: B is zero, A is uniform with variance 1 / (3 in).

    They depend on the seed and the name only, so that they are the same on any number of ranks.
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    source = torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)
    return torch.empty(shape).uniform_(-1 / math.sqrt(shape[1]), 1 / math.sqrt(shape[1]), generator=source)


def _make_quantized(blocks: nn.ModuleList, dtype: torch.dtype) -> None:
    """Replace the linear layers of `blocks` by 4-bit ones on the meta device."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise UserError(
            'lora.quantize: nf4 needs bitsandbytes, which is not installed (pip install "fastft[lora]")'
        ) from None
    for parent in list(blocks.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                bias = linear.bias is not None
                small = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias, dtype, quant_type="nf4", device="meta"
                )
                setattr(parent, name, small)


@torch.no_grad()
def load_quantized(causal_lm: nn.Module, read: Read, device: torch.device) -> set[nn.Parameter]:
    """Read the weights of the 4-bit layers and quantize them, one at a time, whole on every process; collective.

    Returns the quantized weights, which must not be sharded.
    """
    import bitsandbytes as bnb

    loaded = set()
    for name, linear in causal_lm.named_modules():
        if isinstance(linear, bnb.nn.Linear4bit):
            whole = read(f"{name}.weight")[:].to(linear.compute_dtype)
            weight = linear.weight
            linear.weight = type(weight)(whole, requires_grad=False, quant_type=weight.quant_type, module=linear).to(
                device
            )
            loaded.add(linear.weight)
    return loaded


def merged(causal_lm: nn.Module, name: str, parameter: nn.Parameter) -> Tensor:
    """A frozen parameter, whole, with its adapter merged in if it has one; collective."""
    weight = _dequantized(parameter) if hasattr(parameter, "quant_state") else gather(parameter)
    if not name.endswith(".base_layer.weight"):
        return weight
    layer = causal_lm.get_submodule(name.removesuffix(".base_layer.weight"))
    a, b = (gather(part["default"].weight).float() for part in (layer.lora_A, layer.lora_B))
    return weight.float() + layer.scaling["default"] * b @ a


def _dequantized(parameter: nn.Parameter) -> Tensor:
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)


def prove_settings(settings, path: Path) -> None:
    """Write peft's config into the directory `path` and read it back. Raises UserError if that fails or changes it."""
    peft = _peft()
    try:
        settings.save_pretrained(path)
        read = peft.PeftConfig.from_pretrained(path)
    except (ValueError, TypeError, KeyError) as error:
        if is_ours(error):
            raise
        raise UserError(f"lora: the adapter's config cannot be saved ({error})") from error
    facts = lambda config: (config.r, config.lora_alpha, set(config.target_modules))  # noqa: E731
    if facts(read) != facts(settings):
        raise UserError("lora: the adapter's config changes when it is saved and read again")


def write_adapter(adapters: dict[str, Tensor], settings, path: Path) -> None:
    """Write adapters to the new directory `path`, in the format that PeftModel.from_pretrained(model, path) loads.

    `adapters` holds whole tensors by their names in the model.
    """
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    named = {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in adapters.items()}
    save_file(named, path / "adapter_model.safetensors", metadata={"format": "pt"})
    settings.save_pretrained(path)
