"""Flags of the model: architecture, weights, head, BatchNorm, EMA, device and precision."""

from dataclasses import dataclass
from typing import Any

from timm_mldecoder.flags.flag import DISTRIBUTED, NO_HEAD, ON_ACCELERATOR, Need, both, given, train, validate
from timm_mldecoder.flags.group import Group

_EMA = given('model_ema')

# fmt: off
USES_HEAD = Need(lambda o: bool(o.use_ml_decoder_head), '--use-ml-decoder-head 1')
BIAS = Need(lambda o: not o.cosine_classifier, 'a classifier with a bias, which --cosine-classifier does not have')
NO_CHECKPOINT = Need(lambda o: not o.checkpoint, 'no --checkpoint, which replaces the pretrained weights')
SCRIPTED = given('torchscript')
NO_SCRIPT = Need(lambda o: not o.torchscript, 'no --torchscript, which leaves it out')
NO_COMPILE = Need(lambda o: not o.torchcompile, 'no --torchcompile, which replaces it')
FSDP = Need(lambda o: o.parallel == 'fsdp', '--parallel fsdp')


@dataclass(frozen=True)
class ModelOptions(Group):
    """Model and weights."""

    model: str = both('resnet50', 'timm model to train', names='--model -m', inherited=True,
        in_validate=dict(default='dpn92', help='timm model, a pattern of names, all, or a text file of names'))
    pretrained: bool = both(False, 'start from the pretrained weights of the model',
        in_validate=dict(help='evaluate the pretrained weights', needs=(NO_CHECKPOINT,)))
    pretrained_path: str | None = train(None, 'file with the pretrained weights (with --pretrained)', path='file')
    pretrained_cfg_overlay: dict[str, Any] = train({}, 'entries of the pretrained configuration to replace',
        needs=given('pretrained'))
    initial_checkpoint: str = train('', 'checkpoint loaded into the model after it is created', path='file')
    fresh_head: bool = train(False, 'initialize the whole head; without it, head weights that do not depend on the '
        'classes are loaded from a checkpoint with other classes')
    resume: str = train('', 'checkpoint to resume from; auto: the newest one of --experiment', metavar='FILE')
    no_resume_opt: bool = train(False, 'resume the model weights only, not the optimizer', needs=given('resume'))
    checkpoint: str = validate('', 'checkpoint to evaluate, or a folder of them', path='file or folder')
    use_ema: bool | None = validate(None, 'evaluate the EMA weights, or with --no-use-ema the raw ones. If not given: '
        'the weights by which training ranked the checkpoint, EMA weights where there are any. The same default holds '
        'for predict and convert', needs=given('checkpoint'))
    num_classes: int | None = both(None, 'number of classes; those of the data if not given', range='[1, 10000000]',
        inherited=True)
    gp: str | None = both(None, 'global pooling: fast, avg, max, avgmax or catavgmax', metavar='POOL', inherited=True,
        needs=NO_HEAD._replace(text='--use-ml-decoder-head 0: an ML-Decoder head does not pool'))
    model_kwargs: dict[str, Any] = both({}, 'more arguments of the model', inherited=True)
    freeze_backbone: bool = train(False, 'train the head only; the backbone stays in evaluation mode')
    unfreeze_epoch: int | None = train(None, 'epoch from which a frozen backbone is trained', range='[1, inf)',
        needs=given('freeze_backbone'))
    head_init_scale: float | None = train(None, 'factor of the initial classifier weights', needs=BIAS)
    head_init_bias: float | None = train(None, 'initial bias of the classifier', needs=BIAS)
    grad_checkpointing: bool = train(False, 'recompute activations in the backward pass to save memory',
        needs=NO_SCRIPT)
    fast_norm: bool = both(False, "use timm's faster normalization layers under autocast")
    channels_last: bool = both(False, 'use the channels-last memory layout', inherited=True)
    reparam: bool = validate(False, 'fuse reparameterizable layers')
    fuse_bn: bool = validate(False, 'fold BatchNorm into the convolutions before it')
    torchcompile: str | None = both(None, 'compile the model with torch.compile', nargs='?', const='inductor',
        metavar='BACKEND')
    torchcompile_mode: str | None = both(None, 'mode of torch.compile', needs=given('torchcompile'),
        choices=('default', 'lite', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs'))
    torchscript: bool = both(False, 'compile the model with torch.jit.script; not with an ML-Decoder head, which '
        '--torchcompile compiles')
    fuser: str = both('', 'fuser of torch.jit.script', choices=('', 'te', 'old', 'legacy', 'nvfuser', 'nvf'),
        needs=SCRIPTED)
    aot_autograd: bool = validate(False, 'compile with the AOT Autograd backend', needs=NO_COMPILE)



@dataclass(frozen=True)
class HeadOptions(Group):
    """Head."""

    use_ml_decoder_head: int = both(0, '1: ML-Decoder head; 0: the head of the model', choices=(0, 1), inherited=True)
    num_of_groups: int = both(-1, 'number of queries K of the head; -1: min(100, classes), or one per class with text '
        'queries', metavar='K', range='[-1, 1000000]', needs=USES_HEAD, inherited=True)
    decoder_embedding: int = both(768, 'width D of the head', metavar='D', range='[-1, 65536]', needs=USES_HEAD,
        inherited=True)
    ml_decoder_kwargs: dict[str, Any] = both({}, 'more options of MLDecoder, such as num_layers=2 '
        'learnable_queries=True', needs=USES_HEAD, inherited=True)
    cosine_classifier: float | None = both(None, 'cosine classifier on the pooled features; its logits are the cosine '
        'times this scale', metavar='SCALE', range='(0, inf)', inherited=True)
    graph: str = both('', 'label graph of a graph classifier, from timm_mldecoder.label_graph', path='file',
        inherited=True)
    graph_layer: str = both('gcn', 'layer of the graph classifier: graph convolution or graph attention',
        choices=('gcn', 'gat'), needs=given('graph'), inherited=True)



@dataclass(frozen=True)
class DeviceOptions(Group):
    """Device and precision."""

    device: str = both('cuda', 'device, such as cuda:1 or cpu; without the flag, cpu where there is no cuda')
    device_modules: list[str] | None = train(None, 'Python modules to import for the device', metavar='MODULE')
    num_gpu: int = validate(1, 'number of GPUs of a single process', range='[1, 1024]')
    amp: bool = both(False, 'automatic mixed precision', inherited=True)
    amp_dtype: str = both('float16', 'dtype of mixed precision; on a CPU the default is bfloat16',
        choices=('float16', 'bfloat16'), needs=given('amp'), inherited=True)
    model_dtype: str | None = both(None, 'dtype of the weights and images', choices=('float32', 'float16', 'bfloat16'),
        inherited=True)
    parallel: str = train('ddp', 'ddp: replicate the model on every rank; fsdp: shard it (FSDP2)',
        choices=('ddp', 'fsdp'), needs=DISTRIBUTED)
    hsdp: int | None = train(None, 'ranks that shard one copy of the model, such as the GPUs of a node (default: all)',
        range='[1, inf)', needs=FSDP)
    no_ddp_bb: bool = train(False, 'do not broadcast buffers between ranks', needs=DISTRIBUTED)
    synchronize_step: bool = train(False, 'synchronize with the device after each optimizer step', needs=ON_ACCELERATOR)
    local_rank: int = train(0, 'set by torch.distributed.launch', names='--local_rank --local-rank',
        range='[0, 1048576]')



@dataclass(frozen=True)
class BatchNormOptions(Group):
    """BatchNorm."""

    bn_momentum: float | None = train(None, 'momentum of BatchNorm', range='[0, 1]')
    bn_eps: float | None = train(None, 'epsilon of BatchNorm', range='[0, inf)')
    sync_bn: bool = train(False, 'compute BatchNorm statistics over all ranks', needs=DISTRIBUTED)
    split_bn: bool = train(False, 'train a BatchNorm for each view of --aug-splits, or with --resplit for each half '
        'of the batch; evaluation uses the first')
    dist_bn: str = train('reduce', 'after each epoch, broadcast BatchNorm statistics from rank 0, average them '
        '(reduce), or keep them ("")', choices=('broadcast', 'reduce', ''), needs=DISTRIBUTED)



@dataclass(frozen=True)
class EmaOptions(Group):
    """EMA weights."""

    model_ema: bool = train(False, 'keep an exponential moving average of the weights')
    model_ema_force_cpu: bool = train(False, 'keep the EMA weights on the CPU, without evaluating them', needs=_EMA)
    model_ema_decay: float = train(0.9998, 'decay of the EMA weights per optimizer step', range='[0, 1]', needs=_EMA)
    model_ema_warmup: bool = train(False, 'use a smaller decay at first; on by default in a run that is too short for '
        'the default decay', needs=_EMA)
    better_of_ema: bool = train(False, 'rank an epoch by the better of raw and EMA weights, not by the EMA weights',
        needs=_EMA)
