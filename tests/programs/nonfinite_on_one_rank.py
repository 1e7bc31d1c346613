"""train.py, in which rank 1 makes its loss NaN in one step and its gradient infinite in another.

`nonfinite_on_one_rank.py FLAGS... REPORT` writes the steps that each rank made, and those that changed no tensor of the
model, to `REPORT.RANK`.
"""

import json
import sys

import torch
from torch import nn

from timm_mldecoder.distributed.world import join_world, local
from timm_mldecoder.flags import parse_train
from timm_mldecoder.train.build_run import build_run
from timm_mldecoder.train.loop import fit


def main() -> None:
    *flags, report = sys.argv[1:]
    options = parse_train(flags)
    with join_world(options.device) as world:
        run = build_run(options, world)
        model, task = run.state.task.get_eval_model(), run.state.task
        steps, before, made = [0], [], []

        def snapshot(module, inputs):
            steps[0] += 1
            before.append([local(tensor).clone() for tensor in model.state_dict().values()])

        def nonfinite_loss(module, inputs, result):
            if world.rank == 1 and steps[0] == 2:
                result['loss'] = result['loss'] * float('nan')

        def nonfinite_gradient(gradient):
            return gradient / 0 if world.rank == 1 and steps[0] == 4 else gradient

        def hook_gradient(module, inputs, output):
            if output.requires_grad:
                output.register_hook(nonfinite_gradient)

        task.register_forward_pre_hook(snapshot)
        task.register_forward_hook(nonfinite_loss)
        stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        stem.register_forward_hook(hook_gradient)
        run.state.optimizer.register_step_post_hook(lambda *_: made.append(steps[0]))
        fit(run)

    same = [all(map(torch.equal, now, later)) for now, later in zip(before[:-1], before[1:], strict=True)]
    unchanged = [step for step, is_same in enumerate(same, 1) if is_same]
    with open(f'{report}.{world.rank}', 'w') as file:
        json.dump(dict(made=made, unchanged=unchanged), file)


if __name__ == '__main__':
    main()
