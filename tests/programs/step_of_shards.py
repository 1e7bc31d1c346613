"""Print the optimizers of a list whose steps on shards of the parameters are those on whole ones: `... NAME...`."""

import sys

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def same(name: str) -> bool:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Unflatten(1, (1, 7)), nn.Conv1d(1, 3, 3))
    divided = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Unflatten(1, (1, 7)), nn.Conv1d(1, 3, 3))
    divided.load_state_dict(whole.state_dict())
    fully_shard(divided, mesh=init_device_mesh('cpu', (dist.get_world_size(),)))
    optimizers = [create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.05) for model in (whole, divided)]
    for _ in range(8):
        images = torch.randn(4, 5)  # the same on all ranks, so that their mean gradient is that of each
        for model, optimizer in zip((whole, divided), optimizers, strict=True):
            model(images).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(whole.parameters(), divided.parameters(), strict=True)
    return all(torch.allclose(one, other.full_tensor(), rtol=1e-5, atol=1e-6) for one, other in pairs)


def main() -> None:
    dist.init_process_group('gloo')
    for name in sys.argv[1:]:
        try:
            works = same(name)
        except Exception as error:  # whatever an optimizer makes of a slice
            works = False
            print(name, 'raises', repr(error)[:150], file=sys.stderr)
        if works and dist.get_rank() == 0:
            print(name)
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
