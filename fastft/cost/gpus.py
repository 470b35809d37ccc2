"""TODO docstring of fastft.cost.gpus."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastft.errors import UserError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. Its peak in FLOP/s is in fastft.train.metrics, by the same name."""

    name: str
    gib: float
    """Memory that torch.cuda.get_device_properties reports, about."""
    watts: float
    """Thermal design power."""


# From NVIDIA's data sheets of these products (A10G: of AWS G5; A100, H100, H200: SXM). Memory is sold in GB, and ECC takes some.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40GB", 39.4, 400),
        Gpu("A100-80GB", 79.2, 400),
        Gpu("H100-80GB", 79.1, 700),
        Gpu("H200", 139.8, 700),
        Gpu("L40S", 44.4, 350),
        Gpu("A10G", 22.1, 300),
        Gpu("RTX-4090", 23.5, 450),
    )
}


def _known_gpu(key: str, name: str) -> None:
    if name not in GPUS:
        raise UserError(f"{key}: no GPU {name!r} is known; known are {', '.join(GPUS)}")


# Dense bf16 peak in FLOP/s by words of the device's name, from the vendors' data sheets; the first match counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "4090": 165e12,
    "3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """None for a device that is not known. Whole words: an RTX A1000 is no A100."""
    return next((flops for words, flops in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", device_name)), None)
