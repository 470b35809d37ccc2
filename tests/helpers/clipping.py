"""The norm and the clipped gradients of sharded layers, under FSDP over 4 ranks and HSDP. test_optim.py runs it under ranks.py.

torchrun --nproc-per-node 4 tests/helpers/clipping.py OUT.pt MAX_NORM
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastft.common.command_line import leave
from fastft.train.optim import clip_gradients


def layers() -> nn.Module:
    """Layers with 17 rows, 1 row and a bias: their shards have unequal sizes, and some ranks have none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 17), nn.Linear(17, 1, bias=False), nn.RMSNorm(1))


def backward(model: nn.Module) -> None:
    model(torch.linspace(-1, 1, 33 * 5).view(5, 33)).exp().sum().backward()


def clipped(mesh: tuple[int, ...], max_norm: float) -> dict:
    model = layers()
    device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("copies", "shards")[-len(mesh) :])
    for module in (*model, model):
        fully_shard(module, mesh=device_mesh)
    backward(model)
    norm = clip_gradients(model, max_norm)
    return {"norm": norm, "gradients": [p.grad.full_tensor() for p in model.parameters()]}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = [clipped(mesh, float(sys.argv[2])) for mesh in ((4,), (2, 2))]
    if dist.get_rank() == 0:
        torch.save(results, sys.argv[1])
    dist.destroy_process_group()
    leave(0)
