"""Options that do not work with a model or a head that is divided over ranks, and why."""

import inspect
from collections.abc import Iterator

import torch
from torch.distributed.fsdp import fully_shard

from timm_mldecoder.flags.options import Options

#: Options that do not work with `--parallel fsdp` and `--head-parallel`, and why.
_NOT_DIVIDED = {
    'sam': 'it moves whole weights',
    'sync_bn': 'it was not tested',
    'split_bn': 'it was not tested',
    'channels_last': 'slices of parameters are contiguous',
    'model_ema_force_cpu': 'the EMA weights are divided over ranks as the model is',
    'kd_model_name': 'the teacher would not be divided',
    'kd_checkpoint': 'the teacher would not be divided',
    'torchscript': 'a script has no hooks',
    'naflex_loader': 'it was not tested',
    'graph': 'it was not tested',
    'lr_find': 'it was not tested; find the rate with --parallel ddp on a smaller model',
}
_NOT_WITH_DIVIDED_HEAD = {
    'torchcompile': 'it was not tested',
    'train_img_sizes': 'ranks need images of one size',
    'class_split': 'text queries are not divided',
    'word_embeddings': 'text queries are not divided',
}
#: Optimizers whose steps on slices of the parameters are those on whole ones: entry by entry, or with norms and means
#: that DTensor computes over all slices. tests/programs/step_of_slices.py found them; states of another shape than the
#: parameter (adafactor) could not be resumed on another number of ranks.
DIVISIBLE_OPTIMIZERS = (
    'adabelief', 'adadelta', 'adagrad', 'adam', 'adamax', 'adamc', 'adamw', 'adamwlegacy', 'adan', 'adanw', 'adopt',
    'adoptc', 'adoptw', 'cadamc', 'cadamw', 'cadan', 'cadanw', 'cadopt', 'cadoptc', 'cadoptw', 'clamb', 'clambw',
    'claprop', 'clion', 'clionc', 'cnadamc', 'cnadamw', 'crmsproptf', 'csgdc', 'csgdw', 'lamb', 'lambc', 'lambcd',
    'lambcw', 'lambw', 'laprop', 'lapropc', 'larc', 'lars', 'lion', 'lionc', 'madgrad', 'madgradw', 'momentum',
    'nadam', 'nadamc', 'nadamlegacy', 'nadamw', 'nesterov', 'nesterovw', 'nlarc', 'nlars', 'radabelief', 'radam',
    'radamlegacy', 'radamw', 'rmsprop', 'rmsproptf', 'rmsproptfc', 'rmsproptfw', 'sgd', 'sgdc', 'sgdw',
)  # fmt: skip


def problems_of_divided(o: Options) -> Iterator[str]:
    """What does not work with `--parallel fsdp` or `--head-parallel`, one of which is on."""
    way = '--parallel fsdp' if o.parallel == 'fsdp' else '--head-parallel'
    if 'ignored_params' not in inspect.signature(fully_shard).parameters:
        yield f'{way} needs a newer torch than {torch.__version__}, whose fully_shard has no ignored_params'
    for name, reason in _NOT_DIVIDED.items():
        if o[name]:
            yield f'{o.flag(name)} does not work with {way}: {reason}'
    if o.opt.lower() not in DIVISIBLE_OPTIMIZERS:
        yield (
            f'--opt {o.opt} does not work with {way}, which gives it slices of the parameters; choose from '
            f'{", ".join(DIVISIBLE_OPTIMIZERS)}'
        )
    for name, reason in _NOT_WITH_DIVIDED_HEAD.items() if o.head_parallel else ():
        if o[name]:
            yield f'{o.flag(name)} does not work with --head-parallel: {reason}'
    if o.val_bad_image == 'skip':
        yield f'--val-bad-image skip does not work with {way}, whose ranks need as many batches each'
    if o.amp and o.amp_dtype == 'float16':
        yield f'--amp in float16 does not work with {way}: add --amp-dtype bfloat16'
    if o.clip_grad and o.clip_mode == 'agc':
        yield f'--clip-mode agc does not work with {way}: choose norm or value'
    if o.dataset.partition('/')[0].lower() in ('hfids', 'tfds', 'wds'):
        yield f'--dataset {o.dataset}: a stream may end earlier on one rank, which {way} cannot do'
