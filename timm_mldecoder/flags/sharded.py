"""Options that do not work with a sharded model, and why."""

from collections.abc import Iterator

from timm_mldecoder.flags.options import Options

#: Options that do not work with `--parallel fsdp`, and why.
_NOT_SHARDED = {
    'sam': 'it moves whole weights',
    'sync_bn': 'it was not tested',
    'split_bn': 'it was not tested',
    'channels_last': 'shards of parameters are contiguous',
    'model_ema_force_cpu': 'the EMA weights are sharded as the model is',
    'kd_model_name': 'the teacher would not be divided',
    'kd_checkpoint': 'the teacher would not be divided',
    'torchscript': 'a script has no hooks',
    'naflex_loader': 'it was not tested',
    'graph': 'it was not tested',
    'lr_find': 'it was not tested; find the rate with --parallel ddp on a smaller model',
}
#: Optimizers whose steps on shards of the parameters are those on whole ones: entry by entry, or with norms and means
#: that DTensor computes over all shards. tests/programs/step_of_shards.py found them; states of another shape than the
#: parameter (adafactor) could not be resumed on another number of ranks.
SHARDABLE_OPTIMIZERS = (
    'adabelief', 'adadelta', 'adagrad', 'adam', 'adamax', 'adamc', 'adamw', 'adamwlegacy', 'adan', 'adanw', 'adopt',
    'adoptc', 'adoptw', 'cadamc', 'cadamw', 'cadan', 'cadanw', 'cadopt', 'cadoptc', 'cadoptw', 'clamb', 'clambw',
    'claprop', 'clion', 'clionc', 'cnadamc', 'cnadamw', 'crmsproptf', 'csgdc', 'csgdw', 'lamb', 'lambc', 'lambcd',
    'lambcw', 'lambw', 'laprop', 'lapropc', 'larc', 'lars', 'lion', 'lionc', 'madgrad', 'madgradw', 'momentum',
    'nadam', 'nadamc', 'nadamlegacy', 'nadamw', 'nesterov', 'nesterovw', 'nlarc', 'nlars', 'radabelief', 'radam',
    'radamlegacy', 'radamw', 'rmsprop', 'rmsproptf', 'rmsproptfc', 'rmsproptfw', 'sgd', 'sgdc', 'sgdw',
)  # fmt: skip


def problems_of_sharded(o: Options) -> Iterator[str]:
    """What does not work with `--parallel fsdp`."""
    for name, reason in _NOT_SHARDED.items():
        if o[name]:
            yield f'{o.flag(name)} does not work with --parallel fsdp: {reason}'
    if o.opt.lower() not in SHARDABLE_OPTIMIZERS:
        yield (
            f'--opt {o.opt} does not work with --parallel fsdp, which gives it shards of the parameters; choose from '
            f'{", ".join(SHARDABLE_OPTIMIZERS)}'
        )
    if o.val_bad_image == 'skip':
        yield '--val-bad-image skip does not work with --parallel fsdp, whose ranks need as many batches each'
    if o.amp and o.amp_dtype == 'float16':
        yield '--amp in float16 does not work with --parallel fsdp: add --amp-dtype bfloat16'
    if o.clip_grad and o.clip_mode == 'agc':
        yield '--clip-mode agc does not work with --parallel fsdp: choose norm or value'
    if o.dataset.partition('/')[0].lower() in ('hfids', 'tfds', 'wds'):
        yield f'--dataset {o.dataset}: a stream may end earlier on one rank, which --parallel fsdp cannot do'
