"""Flags of the model, its head, the device it runs on, batch norm and averaged weights."""

from timm_mldecoder.engine.flags.flag import Group, flag, pairs, switch

MODEL: Group = (
    'Model',
    [
        flag('--model', type=str, metavar='NAME', default='resnet50', help='timm model to train'),
        switch('--pretrained', help='start from the pretrained weights of the model'),
        flag('--pretrained-path', type=str, metavar='FILE', help='file to load as if it were the pretrained weights'),
        flag(
            '--initial-checkpoint',
            type=str,
            metavar='FILE',
            default='',
            help='checkpoint loaded into the model once built',
        ),
        flag(
            '--resume',
            type=str,
            metavar='FILE',
            default='',
            help='checkpoint to go on from, or "auto" for the newest of --experiment',
        ),
        switch('--no-resume-opt', help='resume the weights alone, not the optimizer'),
        flag('--num-classes', type=int, metavar='N', help='number of classes, the default of the model if not given'),
        flag('--gp', type=str, metavar='POOL', help='global pooling: fast, avg, max, avgmax, catavgmax'),
        flag('--img-size', type=int, metavar='N', help='image size, the default of the model if not given'),
        flag('--in-chans', type=int, metavar='N', help='image channels'),
        flag(
            '--input-size',
            type=int,
            nargs=3,
            metavar='N',
            help='channels, height and width, over --img-size and --in-chans',
        ),
        flag('--crop-pct', type=float, metavar='PCT', help='centre crop of evaluation images'),
        flag('--mean', type=float, nargs='+', metavar='MEAN', help='mean of the pixels'),
        flag('--std', type=float, nargs='+', metavar='STD', help='standard deviation of the pixels'),
        flag('--interpolation', type=str, metavar='NAME', default='', help='interpolation of evaluation images'),
        flag('-b', '--batch-size', type=int, metavar='N', default=128, help='images a batch and process'),
        flag('-vb', '--validation-batch-size', type=int, metavar='N', help='the same for validation'),
        switch('--channels-last', help='use the channels-last memory layout'),
        flag('--grad-accum-steps', type=int, metavar='N', default=1, help='batches an update'),
        switch('--grad-checkpointing', help='trade computation for memory'),
        switch('--fast-norm', help="timm's faster norm layers under autocast"),
        pairs('--model-kwargs', help='further arguments of the model'),
        flag('--head-init-scale', type=float, metavar='FACTOR', help='scale the fresh classifier'),
        flag('--head-init-bias', type=float, metavar='BIAS', help='set the bias of the fresh classifier'),
        flag('--torchcompile-mode', type=str, metavar='MODE', help='mode of torch.compile'),
        flag('--torchcompile', type=str, nargs='?', const='inductor', metavar='BACKEND', help='compile the model'),
    ],
)

HEAD: Group = (
    'Head',
    [
        flag(
            '--use-ml-decoder-head',
            type=int,
            default=0,
            choices=[0, 1],
            help='1: an ML-Decoder head; 0: the head of the model',
        ),
        flag('--num-of-groups', type=int, metavar='K', default=-1, help='queries of the head; -1: min(100, classes)'),
        flag('--decoder-embedding', type=int, metavar='D', default=768, help='width of the head'),
        pairs('--ml-decoder-kwargs', help='further options of MLDecoder, as in num_layers=2 learnable_queries=True'),
        flag(
            '--cosine-classifier',
            type=float,
            metavar='SCALE',
            help='without an ML-Decoder head: a cosine classifier on the pooled features, its logits times SCALE',
        ),
    ],
)

DEVICE: Group = (
    'Device and distribution',
    [
        flag('--device', type=str, metavar='NAME', default='cuda', help='device to run on'),
        switch('--amp', help='mixed precision'),
        flag('--amp-dtype', type=str, metavar='DTYPE', default='float16', help='float16 or bfloat16'),
        flag('--model-dtype', type=str, metavar='DTYPE', help='dtype of the weights: float32, float16 or bfloat16'),
        switch('--no-ddp-bb', help='do not broadcast buffers between processes'),
        switch('--synchronize-step', help='wait for the device after every update'),
        flag('--local_rank', '--local-rank', type=int, default=0, help='set by torch.distributed.launch'),
        flag('--device-modules', type=str, nargs='+', metavar='MODULE', help='modules to import for the device'),
    ],
)

BATCH_NORM: Group = (
    'Batch norm',
    [
        flag('--bn-momentum', type=float, metavar='M', help='momentum of batch norm'),
        flag('--bn-eps', type=float, metavar='EPS', help='epsilon of batch norm'),
        switch('--sync-bn', help='batch norm over all processes'),
        flag(
            '--dist-bn',
            type=str,
            metavar='HOW',
            default='reduce',
            help='share running statistics after an epoch: broadcast, reduce or ""',
        ),
    ],
)

EMA: Group = (
    'Averaged weights',
    [
        switch('--model-ema', help='keep an exponential moving average of the weights'),
        switch('--model-ema-force-cpu', help='keep it on the CPU; it is then not evaluated'),
        flag('--model-ema-decay', type=float, metavar='D', default=0.9998, help='decay of the average'),
        switch('--model-ema-warmup', help='let the decay grow at first'),
        switch(
            '--better-of-ema', help='rank an epoch by the better of the weights and their average, not by the average'
        ),
    ],
)
