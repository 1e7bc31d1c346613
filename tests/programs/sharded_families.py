"""One training step of timm models, whole and sharded over two ranks; print those that agree: `... NAME...`."""

import sys

import timm
import torch
from timm.task import ClassificationTask

from timm_mldecoder.distributed.fsdp import units
from timm_mldecoder.distributed.layout import create_layout
from timm_mldecoder.distributed.world import World, join_world
from timm_mldecoder.flags import train_options
from timm_mldecoder.models.classifier_model import classifiers_of


def check(world: World, name: str, **settings) -> None:
    def create(_=True):
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=5, **settings)

    whole, layout = create(), create_layout(OPTIONS, world)
    sharded = layout.create(create)
    assert world.primary or all(parameter.is_meta for parameter in sharded.parameters())
    layout.place(sharded, classifiers_of(sharded))
    assert [*sharded.state_dict()] == [*whole.state_dict()]
    for path, parameter in sharded.named_parameters():
        assert torch.equal(parameter.full_tensor(), whole.get_parameter(path)), path
    for path, buffer in sharded.named_buffers(remove_duplicate=False):
        assert torch.equal(buffer, whole.get_buffer(path)), path

    in_units = {id(p) for module in units(sharded, classifiers_of(sharded)) for p in module.parameters()}
    left = sum(p.numel() for p in sharded.parameters() if id(p) not in in_units)
    assert left <= 0.6 * sum(p.numel() for p in sharded.parameters()), f'{left} parameters are in no unit'

    tasks = [ClassificationTask(model, verbose=False) for model in (whole, sharded)]
    layout.setup_ema(tasks[1], OPTIONS)
    torch.manual_seed(1)
    images, labels = torch.randn(2, *whole.pretrained_cfg['input_size']), torch.tensor([0, 1])
    with torch.inference_mode():  # as where a run resumes with the validation of an epoch
        tasks[1].get_eval_model(ema=True)(images)
        sharded.eval()(images)
    for task in tasks:
        task.get_trainable_module().train()
        torch.manual_seed(1)
        task(images, labels)['loss'].backward()
    for (path, ours), theirs in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), path
        if ours.grad is not None:
            torch.testing.assert_close(theirs.grad.full_tensor(), ours.grad, rtol=1e-4, atol=1e-5, msg=path)


def main() -> None:
    with join_world('cpu') as world:
        for name in sys.argv[1:]:
            for settings in ({}, dict(ml_decoder=dict(decoder_embedding=32, dim_feedforward=32))):
                try:
                    check(world, name, **settings)
                except Exception as error:  # whatever is wrong with one model, the others are checked
                    print(name, settings, repr(error)[:300], file=sys.stderr)
                    break
            else:
                if world.primary:
                    print(name, flush=True)


if __name__ == '__main__':
    OPTIONS = train_options(data_dir='.', device='cpu', parallel='fsdp', model_ema=True)
    main()
