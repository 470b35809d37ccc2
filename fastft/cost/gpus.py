"""The one table of GPU facts: names, memory, power, speed, and how drivers and price catalogs spell each of them.

    peak_flops(torch.cuda.get_device_name())     # dense bf16 FLOP/s of the device at hand, None if it is not in the table
    GPUS["H100-80GB"]                            # a kind by the name that `fastft estimate` prints
    find_gpu("gpus", "H100")                     # a kind by any of its spellings

The numbers are from the vendors' data sheets of these products.
"""

import re
from dataclasses import dataclass

from fastft.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. `fastft estimate` does not offer those whose memory and power are missing from the table."""

    name: str
    bf16_flops: float
    """Peak of dense matrix products in bf16, in FLOP/s."""
    device: str
    """Words of torch.cuda.get_device_name by which the kind is recognised."""
    gib: float | None = None
    """Memory in GiB, about what torch.cuda.get_device_properties reports. Vendors state GB, and error correction takes a part."""
    watts: float | None = None
    """Thermal design power."""
    catalogs: tuple[str, ...] = ()
    """SkyPilot's names for this kind."""

    def __post_init__(self) -> None:
        assert (self.gib is None) == (self.watts is None) == (not self.catalogs), (
            f"{self.name}: all three, or its speed alone"
        )


TABLE = (
    Gpu("A100-40GB", 312e12, "A100", 39.4, 400, ("A100",)),  # SXM
    Gpu("A100-80GB", 312e12, "A100", 79.2, 400, ("A100-80GB", "A100-80GB-SXM")),  # SXM
    Gpu("H100-80GB", 989e12, "H100", 79.1, 700, ("H100", "H100-SXM")),  # SXM
    Gpu("H100-PCIe", 756e12, "H100 PCIe"),
    Gpu("H100-NVL", 835e12, "H100 NVL"),
    Gpu("H200", 989e12, "H200", 139.8, 700, ("H200", "H200-SXM")),  # SXM
    Gpu("H200-NVL", 835e12, "H200 NVL"),
    Gpu("GH200", 989e12, "GH200"),
    Gpu("B200", 2250e12, "B200"),
    Gpu("GB200", 2500e12, "GB200"),
    Gpu("L40S", 362e12, "L40S", 44.4, 350, ("L40S",)),
    Gpu("L40", 181e12, "L40"),
    Gpu("L4", 121e12, "L4"),
    Gpu("A10G", 70e12, "A10G", 22.1, 300, ("A10G",)),  # of AWS G5
    Gpu("A10", 125e12, "A10"),
    Gpu("RTX-4090", 165e12, "4090", 23.5, 450, ("RTX4090",)),
    Gpu("RTX-3090", 71e12, "3090"),
)

_IGNORED = {"NVIDIA", "GEFORCE", "SXM", "SXM4", "SXM5", "HBM3", "HBM3E"}  # words that do not distinguish kinds

GPUS = {gpu.name: gpu for gpu in TABLE if gpu.gib}
"""The kinds that `fastft estimate` offers, by name."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of the device with this name in FLOP/s, or None if it is not in the table.

    Only whole words match, so an RTX A1000 is no A100. Of several matches the longest counts, so an "H100 PCIe" is not taken
    for the faster "H100".
    """
    found = [gpu for gpu in TABLE if re.search(rf"\b{gpu.device}\b", device_name)]
    return max(found, key=lambda gpu: len(gpu.device)).bf16_flops if found else None


def find_gpu(key: str, text: str) -> Gpu:
    """The kind that a user means by `text`: its name, another spelling, or the first words of its name.

    Raises UserError, which begins with the option's name `key`, if `text` means no kind or more than one.
    """
    words = _words(text)
    found = [gpu for gpu in GPUS.values() if _words(gpu.name) == words]
    found = found or [gpu for gpu in GPUS.values() if _may_mean(words, gpu)]
    if not found:
        raise UserError(f"{key}: no GPU {text!r} is known; known are {', '.join(GPUS)}")
    if len(found) > 1:
        raise UserError(f"{key}: {text!r} may mean {' or '.join(gpu.name for gpu in found)}; say which")
    return found[0]


def _may_mean(words: list[str], gpu: Gpu) -> bool:
    """Whether these words are a spelling of the kind, or begin its name. Words match as a whole: L4 does not mean L40S."""
    spellings = [_words(spelling) for spelling in (gpu.device, *gpu.catalogs)]
    return bool(words) and (_words(gpu.name)[: len(words)] == words or words in spellings)


def _words(text: str) -> list[str]:
    """The words that distinguish kinds.

    They are the same for "H100-80GB", "h100 80gb" and the driver's "NVIDIA H100 80GB HBM3".
    """
    return [word for word in re.split(r"[\s_-]+", text.upper()) if word and word not in _IGNORED]
