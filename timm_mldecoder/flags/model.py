"""Flags of the model: architecture, weights, head, BatchNorm, EMA, device and precision."""

from timm_mldecoder.flags.flag import Group, Need, both, train, validate
from timm_mldecoder.flags.needs import DISTRIBUTED, NO_HEAD, ON_ACCELERATOR, given

_EMA = given('model_ema')

# fmt: off
USES_HEAD = Need(lambda o: bool(o.use_ml_decoder_head), '--use-ml-decoder-head 1')
BIAS = Need(lambda o: not o.cosine_classifier, 'a classifier with a bias, which --cosine-classifier does not have')
NO_CHECKPOINT = Need(lambda o: not o.checkpoint, 'no --checkpoint, which replaces the pretrained weights')
SCRIPTED = given('torchscript')
NO_SCRIPT = Need(lambda o: not o.torchscript, 'no --torchscript, which leaves it out')
NO_COMPILE = Need(lambda o: not o.torchcompile, 'no --torchcompile, which replaces it')
FSDP = Need(lambda o: o.parallel == 'fsdp', '--parallel fsdp')

MODEL: Group = ('Model and weights', [
    both('--model -m', str, 'resnet50', 'timm model to train', inherited=True,
         in_validate=dict(default='dpn92', help='timm model, a pattern of names, all, or a text file of names')),
    both('--pretrained', bool, False, 'start from the pretrained weights of the model',
         in_validate=dict(help='evaluate the pretrained weights', needs=(NO_CHECKPOINT,))),
    train('--pretrained-path', str, None, 'file with the pretrained weights (with --pretrained)', path='file'),
    train('--pretrained-cfg-overlay', dict, {}, 'entries of the pretrained configuration to replace', nargs='*',
          needs=given('pretrained')),
    train('--initial-checkpoint', str, '', 'checkpoint loaded into the model after it is created', path='file'),
    train('--fresh-head', bool, False, 'initialize the whole head; without it, head weights that do not depend on the '
          'classes are loaded from a checkpoint with other classes'),
    train('--resume', str, '', 'checkpoint to resume from; auto: the newest one of --experiment', metavar='FILE'),
    train('--no-resume-opt', bool, False, 'resume the model weights only, not the optimizer', needs=given('resume')),
    validate('--checkpoint', str, '', 'checkpoint to evaluate, or a folder of them', path='file or folder'),
    validate('--use-ema', bool, None, 'evaluate the EMA weights, or with --no-use-ema the raw ones. If not given: the '
             'weights by which training ranked the checkpoint, EMA weights where there are any. The same default holds '
             'for predict and convert', needs=given('checkpoint')),
    both('--num-classes', int, None, 'number of classes; those of the data if not given', range='[1, 10000000]',
         inherited=True),
    both('--gp', str, None, 'global pooling: fast, avg, max, avgmax or catavgmax', metavar='POOL', inherited=True,
         needs=NO_HEAD._replace(text='--use-ml-decoder-head 0: an ML-Decoder head does not pool')),
    both('--model-kwargs', dict, {}, 'more arguments of the model', nargs='*', inherited=True),
    train('--freeze-backbone', bool, False, 'train the head only; the backbone stays in evaluation mode'),
    train('--unfreeze-epoch', int, None, 'epoch from which a frozen backbone is trained', range='[1, inf)',
          needs=given('freeze_backbone')),
    train('--head-init-scale', float, None, 'factor of the initial classifier weights', needs=BIAS),
    train('--head-init-bias', float, None, 'initial bias of the classifier', needs=BIAS),
    train('--grad-checkpointing', bool, False, 'recompute activations in the backward pass to save memory',
          needs=NO_SCRIPT),
    both('--fast-norm', bool, False, "use timm's faster normalization layers under autocast"),
    both('--channels-last', bool, False, 'use the channels-last memory layout', inherited=True),
    validate('--reparam', bool, False, 'fuse reparameterizable layers'),
    validate('--fuse-bn', bool, False, 'fold BatchNorm into the convolutions before it'),
    both('--torchcompile', str, None, 'compile the model with torch.compile', nargs='?', const='inductor',
         metavar='BACKEND'),
    both('--torchcompile-mode', str, None, 'mode of torch.compile', needs=given('torchcompile'),
         choices=('default', 'lite', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')),
    both('--torchscript', bool, False, 'compile the model with torch.jit.script; not with an ML-Decoder head, which '
         '--torchcompile compiles'),
    both('--fuser', str, '', 'fuser of torch.jit.script', choices=('', 'te', 'old', 'legacy', 'nvfuser', 'nvf'),
         needs=SCRIPTED),
    validate('--aot-autograd', bool, False, 'compile with the AOT Autograd backend', needs=NO_COMPILE),
])

HEAD: Group = ('Head', [
    both('--use-ml-decoder-head', int, 0, '1: ML-Decoder head; 0: the head of the model', choices=(0, 1),
         inherited=True),
    both('--num-of-groups', int, -1, 'number of queries K of the head; -1: min(100, classes), or one per class with '
         'text queries', metavar='K', range='[-1, 1000000]', needs=USES_HEAD, inherited=True),
    both('--decoder-embedding', int, 768, 'width D of the head', metavar='D', range='[-1, 65536]', needs=USES_HEAD,
         inherited=True),
    both('--ml-decoder-kwargs', dict, {}, 'more options of MLDecoder, such as num_layers=2 learnable_queries=True',
         nargs='*', needs=USES_HEAD, inherited=True),
    both('--cosine-classifier', float, None, 'cosine classifier on the pooled features; its logits are the cosine '
         'times this scale', metavar='SCALE', range='(0, inf)', inherited=True),
    both('--graph', str, '', 'label graph of a graph classifier, from timm_mldecoder.label_graph', path='file',
         inherited=True),
    both('--graph-layer', str, 'gcn', 'layer of the graph classifier: graph convolution or graph attention',
         choices=('gcn', 'gat'), needs=given('graph'), inherited=True),
])

DEVICE: Group = ('Device and precision', [
    both('--device', str, 'cuda', 'device, such as cuda:1 or cpu; without the flag, cpu where there is no cuda'),
    train('--device-modules', str, None, 'Python modules to import for the device', nargs='+', metavar='MODULE'),
    validate('--num-gpu', int, 1, 'number of GPUs of a single process', range='[1, 1024]'),
    both('--amp', bool, False, 'automatic mixed precision', inherited=True),
    both('--amp-dtype', str, 'float16', 'dtype of mixed precision; on a CPU the default is bfloat16',
         choices=('float16', 'bfloat16'), needs=given('amp'), inherited=True),
    both('--model-dtype', str, None, 'dtype of the weights and images', choices=('float32', 'float16', 'bfloat16'),
         inherited=True),
    train('--parallel', str, 'ddp', 'ddp: replicate the model on every rank; fsdp: shard it (FSDP2)',
          choices=('ddp', 'fsdp'), needs=DISTRIBUTED),
    train('--hsdp', int, None, 'ranks that shard one copy of the model, such as the GPUs of a node (default: all)',
          range='[1, inf)', needs=FSDP),
    train('--no-ddp-bb', bool, False, 'do not broadcast buffers between ranks', needs=DISTRIBUTED),
    train('--synchronize-step', bool, False, 'synchronize with the device after each optimizer step',
          needs=ON_ACCELERATOR),
    train('--local_rank --local-rank', int, 0, 'set by torch.distributed.launch', range='[0, 1048576]'),
])

BATCH_NORM: Group = ('BatchNorm', [
    train('--bn-momentum', float, None, 'momentum of BatchNorm', range='[0, 1]'),
    train('--bn-eps', float, None, 'epsilon of BatchNorm', range='[0, inf)'),
    train('--sync-bn', bool, False, 'compute BatchNorm statistics over all ranks', needs=DISTRIBUTED),
    train('--split-bn', bool, False, 'train a BatchNorm for each view of --aug-splits, or with --resplit for each half '
          'of the batch; evaluation uses the first'),
    train('--dist-bn', str, 'reduce', 'after each epoch, broadcast BatchNorm statistics from rank 0, average them '
          '(reduce), or keep them ("")', choices=('broadcast', 'reduce', ''), needs=DISTRIBUTED),
])

EMA: Group = ('EMA weights', [
    train('--model-ema', bool, False, 'keep an exponential moving average of the weights'),
    train('--model-ema-force-cpu', bool, False, 'keep the EMA weights on the CPU, without evaluating them', needs=_EMA),
    train('--model-ema-decay', float, 0.9998, 'decay of the EMA weights per optimizer step', range='[0, 1]',
          needs=_EMA),
    train('--model-ema-warmup', bool, False, 'use a smaller decay at first; on by default in a run that is too short '
          'for the default decay', needs=_EMA),
    train('--better-of-ema', bool, False, 'rank an epoch by the better of raw and EMA weights, not by the EMA weights',
          needs=_EMA),
])
