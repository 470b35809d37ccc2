"""Reads weights from files into a sharded model, so that no process ever holds the whole model.

A model is built on the meta device, sharded, and then filled: `open_weights` finds its tensors, and `fill` lets every
process read its own rows of each tensor from the memory-mapped safetensors files. If the files do not hold the tensors one to
one (fused experts, older names, .bin), transformers loads the model on the first process, which sends one tensor at a time.
`gather` makes a sharded tensor whole again.

Why not torch's HuggingFaceStorageReader: it reads every *.safetensors file in the directory, whatever the index says, supports
neither tied weights nor embeddings that grow, and its errors name neither file nor tensor.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from fastft.common.distributed import on_first
from fastft.errors import UserError, first_line, is_ours
from fastft.model.pretrained import locate

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 4096
"""Rows of a weight that are in memory at a time where all of it is looked at."""


class Rows(Protocol):
    """A tensor, in memory or still in its file, from which rows can be taken."""

    def __getitem__(self, rows: slice) -> Tensor: ...


Read = Callable[[str], Rows]
"""Returns the values of the parameter of transformers' model with this name. All processes ask for the same names in order."""


def compute_buffers(causal_lm: nn.Module) -> None:
    """Compute, on the CPU, the buffers of a model on the meta device that no file holds (rotary frequencies, scales).

    transformers' own initialization does it, as in from_pretrained; the parameters stay without values. It runs twice, over
    buffers filled with zeros, then with ones. If a buffer differs afterwards, it was not computed, and UserError is raised.
    """
    kept = causal_lm.state_dict().keys()
    computed = [name for name, _ in causal_lm.named_buffers() if name not in kept]
    results = []
    for filling in (0, 1):
        for module in causal_lm.modules():
            module._is_hf_initialized = False
        for name in computed:
            owner, attribute = _owner(causal_lm, name)
            setattr(owner, attribute, torch.full_like(getattr(owner, attribute), filling, device="cpu"))
        causal_lm.initialize_weights()
        results.append([causal_lm.get_buffer(name) for name in computed])
    for name, once, again in zip(computed, *results):
        if not torch.equal(once, again):
            raise UserError(
                f"{causal_lm.config.model_type}: transformers does not compute its buffer {name}; such models cannot be trained"
            )


def open_weights(model: str, causal_lm: nn.Module) -> Read:
    """Open the weights of `causal_lm`, which is on the meta device, in a directory or from the Hub; collective.

    An embedding of the model may have more rows than the file. Raises UserError, which names the file and the tensor.
    """
    if Path(model, "adapter_config.json").exists():
        raise UserError(f"{model}: holds an adapter; merge it into its model first")
    files = _safetensors_files(model)
    source = SafetensorsFiles(files) if files else None
    if source and not _renamed(causal_lm, source.files):
        source.require(causal_lm, model)
        return source
    why = "their names or shapes are not those of transformers' model" if files else "they are not in safetensors files"
    logger.info("weights: %s: %s; the first process loads the whole model and sends it to the others", model, why)
    return FirstProcess(model, causal_lm)


class SafetensorsFiles:
    """Tensors in safetensors files, memory-mapped. Raises UserError for a file that is missing, cut short or damaged."""

    def __init__(self, files: dict[Path, list[str]]):
        """`files` maps each path to the names of its tensors according to the index, or to none if there is no index."""
        from safetensors import SafetensorError, safe_open

        self.handles, self.files, self.promised, self.names = {}, {}, {}, {}
        for path, promised in files.items():
            self.promised.update(dict.fromkeys(promised, path))
            if not path.exists():
                raise UserError(f"{path}: is missing; the model's index says that it holds {promised[0]}")
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: {_damage(path) or error}") from None
            for name in handle.keys():  # noqa: SIM118  a handle cannot be iterated over
                self.handles[name], self.files[name] = handle, path

    def __call__(self, name: str) -> Rows:
        held = self.names.get(name, name)
        return self.handles[held].get_slice(held)

    def shape(self, name: str) -> list[int]:
        return self(name).get_shape()

    def require(self, causal_lm: nn.Module, model: str) -> None:
        """Raise UserError unless every tensor of `causal_lm` is here with its shape, and tied ones are equal.

        Tensors that the model does not have only cause a warning.
        """
        surplus = {name: path for name, path in self.files.items() if not name.endswith("rotary_emb.inv_freq")}
        growing = _embedding_names(causal_lm)
        for names, tensor in _tensors(causal_lm):
            held = [name for name in names if name in self.files]
            if not held:
                path = next((self.promised[n] for n in names if n in self.promised), next(iter(self.files.values())))
                raise UserError(f"{path}: the weight {names[0]} is missing")
            for name in held:
                self._require_shape(name, tensor.shape, name in growing)
                surplus.pop(name, None)
            for name in held[1:]:
                self._require_equal(held[0], name, model)
            self.names[names[0]] = held[0]  # the file has tied weights under one of their names
        if surplus:
            name, path = next(iter(surplus.items()))
            logger.warning("%s: %s has no place in the model (%d such tensors); left out", path, name, len(surplus))

    def _require_shape(self, name: str, wanted: torch.Size, may_grow: bool) -> None:
        shape = self.shape(name)
        grows = may_grow and shape[0] <= wanted[0] and shape[1:] == list(wanted[1:])
        if shape != list(wanted) and not grows:
            raise UserError(f"{self.files[name]}: {name} has shape {shape}, by the config it is {list(wanted)}")

    def _require_equal(self, name: str, other: str, model: str) -> None:
        same = self.shape(name) == self.shape(other) and all(
            torch.equal(a, b) for a, b in zip(_in_parts(self(name)), _in_parts(self(other)))
        )
        if not same:
            raise UserError(_UNTIED.format(self.files[other], other, model))


_UNTIED = '{}: {} differs from the weight that {}/config.json ties it to; put "tie_word_embeddings": false there'


class FirstProcess:
    """The weights of a model that transformers loads on the first process, in fp32. Each is sent to all when it is asked for."""

    def __init__(self, model: str, causal_lm: nn.Module):
        self.state: dict[str, Tensor] = {}

        def load() -> dict[str, torch.Size]:
            self.state = _load_whole(model)
            for names, _ in _tensors(causal_lm):
                if any(self.state[name] is not self.state[names[0]] for name in names):
                    raise UserError(_UNTIED.format(model, names[0], model))
            return {name: tensor.shape for name, tensor in self.state.items()}

        self.shapes = on_first(load)

    def __call__(self, name: str) -> Rows:
        mine = self.state.pop(name, None)  # not kept, because each tensor is asked for once
        tensor = torch.empty(self.shapes[name]) if mine is None else mine.detach().contiguous()
        dist.broadcast(tensor, 0)
        return tensor


def _load_whole(model: str) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        causal_lm, info = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers raises a dozen kinds: for files cut short, shapes that differ, and so on
        if is_ours(error):
            raise
        raise UserError(f"{model}: the model cannot be loaded ({first_line(error)})") from None
    if missing := sorted(info["missing_keys"]):  # transformers would initialise them with random numbers
        raise UserError(f"{model}: {len(missing)} weights are missing from its files, the first {missing[0]}")
    return causal_lm.state_dict(keep_vars=True)


def fill_buffers(model: nn.Module, read: Read) -> None:
    """Read the buffers that are in files to the CPU; sharding moves them to the device later. Collective."""
    for name, empty in list(model.named_buffers()):
        if empty.is_meta:
            setattr(*_owner(model, name), read(name)[...].to(empty.dtype))


@torch.no_grad()
def fill(
    model: nn.Module,
    read: Read,
    device: torch.device,
    dtype: Callable[[nn.Parameter], torch.dtype],
    wanted: Callable[[nn.Parameter], bool] = lambda parameter: True,
) -> None:
    """Give every parameter on the meta device its values, or this process's rows of them; collective.

    `read` is called once for each parameter, in the same order on every process. Tied parameters stay tied. Rows that are not in
    the file (of an embedding that grew) become the mean of those that are. A parameter that is not `wanted` gets memory, but
    no values.
    """
    places = defaultdict(list)
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            places[parameter].append((module, attribute))
    for name, empty in list(model.named_parameters()):
        if empty.is_meta:
            values = torch.empty_like(empty, dtype=dtype(empty), device=device)
            if wanted(empty):
                _read_own_rows(values, read(name))
            values = nn.Parameter(values, requires_grad=empty.requires_grad)
            for module, attribute in places[empty]:
                setattr(module, attribute, values)


def _read_own_rows(values: Tensor, rows: Rows) -> None:
    """Copy into `values` its rows: all of them, or this process's shard if it is a DTensor."""
    if not isinstance(values, DTensor):
        values.copy_(_take(rows, 0, len(values)))
        return
    assert values.placements[-1] == Shard(0), values.placements
    dimension = values.device_mesh.ndim - 1
    each = -(-len(values) // values.device_mesh.size(dimension))  # rows of a shard, as torch.chunk cuts them
    begin = min(each * values.device_mesh.get_local_rank(dimension), len(values))
    own = values.to_local()
    own.copy_(_take(rows, begin, begin + len(own)))


def _take(rows: Rows, begin: int, end: int) -> Tensor:
    """Rows `begin` to `end`. Rows after the last one are the mean of all rows."""
    held = _length(rows)
    if end <= held:
        return rows[begin:end]
    total = sum(part.double().sum(0) for part in _in_parts(rows))
    new = (total / held).float().expand(end - max(begin, held), *total.shape)
    return torch.cat([rows[begin:held].float(), new]) if begin < held else new


def _in_parts(rows: Rows) -> Iterator[Tensor]:
    length = _length(rows)
    return (rows[begin : min(begin + ROWS_AT_ONCE, length)] for begin in range(0, length, ROWS_AT_ONCE))


def _length(rows: Rows) -> int:
    return len(rows) if isinstance(rows, Tensor) else rows.get_shape()[0]


def gather(parameter: Tensor) -> Tensor:
    """The whole of a parameter; collective if it is sharded."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _safetensors_files(model: str) -> dict[Path, list[str]] | None:
    """The model's safetensors files, each with its tensors according to the index; None if there are no such files."""
    single = locate(model, "model.safetensors")
    if single.exists():
        return {single: []}
    index = locate(model, "model.safetensors.index.json")
    if not index.exists():
        return None
    files = defaultdict(list)
    try:
        for tensor, file in json.loads(index.read_text())["weight_map"].items():
            files[file].append(tensor)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: is damaged; it should map weights to files") from None
    return {locate(model, file): tensors for file, tensors in files.items()}


def _renamed(causal_lm: nn.Module, names) -> bool:
    """Whether transformers renames or converts any of these tensors when it loads them."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # the function has moved; only transformers itself can tell then
        return True
    for conversion in get_model_conversion_mapping(causal_lm):
        for name in names:
            renamed, matched = conversion.rename_source_key(name)
            if matched and (renamed != name or hasattr(conversion, "operations")):
                return True
    wanted = {name for group, _ in _tensors(causal_lm) for name in group}
    missing = any(not any(name in names for name in group) for group, _ in _tensors(causal_lm))
    return missing and any(name not in wanted for name in names)


def _tensors(causal_lm: nn.Module) -> list[tuple[list[str], Tensor]]:
    """The tensors that the files should hold, each with its names, of which a tied one has several."""
    names = defaultdict(list)
    for name, tensor in causal_lm.state_dict(keep_vars=True).items():
        names[tensor].append(name)
    return [(group, tensor) for tensor, group in names.items()]


def _embedding_names(causal_lm: nn.Module) -> set[str]:
    """The names of the embeddings and of the head, which have a row for each token."""
    owners = (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    tensors = {p for owner in owners if owner is not None for p in owner.parameters()}
    return {name for name, p in causal_lm.named_parameters(remove_duplicate=False) if p in tensors}


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """(the module that has a parameter or buffer of this name, the attribute's name there)."""
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner), attribute


def _damage(path: Path) -> str | None:
    """What is wrong with a safetensors file, or None.

    The file begins with the length of a JSON header (8 bytes), which says where each tensor lies.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            return f"is cut short or no safetensors file: {size} bytes do not hold its header"
        try:
            header = json.loads(file.read(length))
            ends = {name: 8 + length + t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
            return "is damaged: its header is not safetensors'"
    cut = sorted((end, name) for name, end in ends.items() if end > size)
    return f"is cut short: {cut[0][1]} ends at byte {cut[0][0]}, the file at {size}" if cut else None
