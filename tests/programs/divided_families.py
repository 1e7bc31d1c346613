"""One training step of timm models, whole and divided by FSDP2 over one rank; print those that agree: `... NAME...`."""

import sys

import timm
import torch
import torch.distributed as dist
from timm.task import ClassificationTask

from timm_mldecoder.distributed.fsdp import shard_task, units
from timm_mldecoder.distributed.slices import create_sliced
from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags import train_options
from timm_mldecoder.train.freeze import head_modules


def check(name: str, **settings) -> None:
    options = train_options(data_dir='.', device='cpu', parallel='fsdp', model_ema=True)
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=5, **settings)
    torch.manual_seed(0)
    divided, slices = create_sliced(lambda: timm.create_model(name, num_classes=5, **settings), lambda *_: (0, 1))
    assert [*divided.state_dict()] == [*whole.state_dict()]
    for path, parameter in whole.named_parameters():
        assert torch.equal(slices[path], parameter), path

    in_units = {id(p) for module in units(divided, head_modules(divided)) for p in module.parameters()}
    left = sum(p.numel() for p in divided.parameters() if id(p) not in in_units)
    assert left <= 0.6 * sum(p.numel() for p in divided.parameters()), f'{left} parameters are in no unit'

    tasks = [ClassificationTask(model, verbose=False) for model in (whole, divided)]
    shard_task(tasks[1], slices, options, World(torch.device('cpu')), head_modules(divided))
    size = whole.pretrained_cfg['input_size']
    images, labels = torch.randn(2, *size), torch.tensor([0, 1])
    with torch.inference_mode():  # as where a run resumes with the validation of an epoch
        tasks[1].get_eval_model(ema=True)(images)
        divided.eval()(images)
    for task in tasks:
        task.get_trainable_module().train()
        torch.manual_seed(1)
        task(images, labels)['loss'].backward()
    for (path, ours), theirs in zip(whole.named_parameters(), divided.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), path
        if ours.grad is not None:
            torch.testing.assert_close(theirs.grad.full_tensor(), ours.grad, rtol=1e-4, atol=1e-5, msg=path)


def main() -> None:
    dist.init_process_group('gloo', init_method='tcp://127.0.0.1:0', rank=0, world_size=1)
    for name in sys.argv[1:]:
        for settings in ({}, dict(ml_decoder=dict(decoder_embedding=32, dim_feedforward=32))):
            try:
                check(name, **settings)
            except Exception as error:  # whatever is wrong with one model, the others are checked
                print(name, settings, repr(error)[:300], file=sys.stderr)
                break
        else:
            print(name, flush=True)
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
