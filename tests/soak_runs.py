"""The runs that the soak kills: groups of configurations, each by its name and the flags that it adds.

`SINGLE` is an image folder with one class per image, `SEVERAL` a CSV dataset with several. The data is written by
`tests/programs/soak.py`, into the folder that replaces `{data}`.
"""

import shlex

SINGLE = """
    {data}/single --model test_resnet --img-size 32 --num-classes 3 --device cpu -b 4 -j 0 --epochs 2 --warmup-epochs 0
    --lr 1e-3 --log-interval 1
"""
SEVERAL = """
    {data}/several --dataset csv --task multilabel --model test_resnet --img-size 32 --no-aug --device cpu -b 8 -j 0
    --epochs 2 --warmup-epochs 0 --opt adamw --lr 1e-3 --log-interval 1
"""
HEAD = '--use-ml-decoder-head 1 --decoder-embedding 16 --num-of-groups 2'
WORDS = '--use-ml-decoder-head 1 --decoder-embedding 16 --word-embeddings {data}/several/words.safetensors'
SPLIT = '--class-split {data}/several/split.json'
EMA = '--opt adamw --model-ema --model-ema-decay 0.8'
FSDP = '--parallel fsdp --epochs 4'

# A name that begins with "2 ranks" is a run of two; its flags replace those of the base where both have them.
GROUPS: dict[str, dict[str, str]] = {
    'optimizers': {
        f'--opt {name}': f'--opt {name}'
        for name in (
            *('sgd', 'momentum', 'sgdp', 'adamw', 'adafactor', 'adafactorbv', 'adahessian', 'adabelief', 'adan'),
            *('adopt', 'cadamw', 'lamb', 'laprop', 'lars', 'lion', 'lookahead_radam', 'madgrad', 'mars'),
            *('muon', 'nadamw', 'novograd', 'rmsproptf'),
        )
    },
    'schedules': {
        'cosine, 2 cycles, noise': '--lr-cycle-limit 2 --lr-noise 0.2 0.9 --epochs 3',
        'cosine per step, warmup': '--sched-on-updates --warmup-epochs 1 --warmup-prefix',
        'tanh, cooldown': '--sched tanh --cooldown-epochs 1',
        'step': '--sched step --decay-epochs 1',
        'poly, k-decay': '--sched poly --lr-k-decay 1.5 --sched-on-updates',
        'plateau': '--sched plateau --patience-epochs 0 --epochs 3',
        'wsd': '--sched wsd --decay-epochs 0.5',
        'rsqrt': '--sched rsqrt --warmup-epochs 1 --epochs 3 --decay-epochs 0.5',
        'one cycle': '--sched onecycle --warmup-epochs 1 --opt adamw --epochs 3',
        'none': '--sched none',
    },
    'steps': {
        'SAM': '--sam 0.05',
        'SAM, adamw, EMA': f'--sam 0.05 {EMA}',
        'accumulation of 2': '--grad-accum-steps 2',
        'accumulation of 4, clipped norm': '--grad-accum-steps 4 --clip-grad 1',
        'clipped values': '--clip-grad 0.01 --clip-mode value',
        'adaptive clipping': '--clip-grad 0.01 --clip-mode agc',
        'layer decay': '--opt adamw --layer-decay 0.7',
        'head learning rate': '--head-lr-scale 10 --bias-lr-scale 2',
        'dropout, drop path': '--drop 0.3 --drop-path 0.1',
    },
    'EMA and precision': {
        'EMA': EMA,
        'EMA, warmup': f'{EMA} --model-ema-warmup',
        'EMA on the CPU': f'{EMA} --model-ema-force-cpu',
        'the better of both': f'{EMA} --better-of-ema',
        'EMA, accumulation': f'{EMA} --grad-accum-steps 2',
        'autocast bfloat16': '--amp --opt adamw',
        'autocast bfloat16, EMA': f'--amp {EMA}',
        'weights in bfloat16': '--model-dtype bfloat16',
        'weights in bfloat16, EMA': f'--model-dtype bfloat16 {EMA}',
    },
    'images': {
        'mixup, CutMix': '--mixup 0.2 --cutmix 1 --mixup-off-epoch 1',
        'random augmentation, erasing': '--aa rand-m5 --reprob 0.5 --cutout 0.3',
        'no prefetcher, 1 worker': '--no-prefetcher --mixup 0.2 -j 1',
        '1 worker, next epoch early': '-j 1 --use-multi-epochs-loader',
        'balanced sampler': '--sampler balanced',
        'several sizes': '--train-img-sizes 24 32 40',
        'progressive sizes': '--train-img-sizes 24 32 40 --train-size-schedule progressive --epochs 3',
        'progressive batch sizes': '--train-img-sizes 24 32 --train-batch-sizes 6 4 --variable-batch-loss-scale linear',
        '3 views': '--aug-splits 3',
        '3 views, JSD, split BatchNorm': '--aug-splits 3 --jsd-loss --split-bn --aa rand-m5',
        'WebDataset': '--dataset wds/soak --data-dir {data}/shards --grad-accum-steps 2',
    },
    'heads': {
        'ML-Decoder': HEAD,
        'ML-Decoder, 2 layers, dropout': f'{HEAD} --ml-decoder-kwargs num_layers=2 dropout=0.1 num_heads=2',
        'ML-Decoder, cosine': f'{HEAD} --ml-decoder-kwargs classifier=cosine cosine_scale=20',
        'cosine': '--cosine-classifier 20 --opt adamw',
        'multi-label, ASL': f'several {HEAD} --loss asl --num-classes 75',
        'multi-label, cosine, AAM, SAM': 'several --cosine-classifier 1 --loss aam --sam 0.05 --num-classes 75',
        'text queries': f'several {WORDS} --num-classes 75',
        'text queries, unseen classes': f'several {WORDS} {SPLIT} --num-classes 60',
        'text queries, query augmentations': f'several {WORDS} {SPLIT} --random-queries 3 --query-noise 0.1'
        ' --num-classes 60',
        'graph': 'several --graph {data}/graph.safetensors --word-embeddings {data}/several/words.safetensors'
        ' --num-classes 75',
        'graph attention, cosine': 'several --graph {data}/graph.safetensors --graph-layer gat --cosine-classifier 20'
        ' --word-embeddings {data}/several/words.safetensors --num-classes 75',
    },
    'epochs': {
        'frozen backbone': f'{HEAD} --freeze-backbone',
        'unfrozen later, EMA': f'{HEAD} --freeze-backbone --unfreeze-epoch 1 --epochs 3 {EMA}',
        'validated every 2 epochs': '--val-interval 2 --epochs 4',
        'milestones, 1 checkpoint': '--save-epochs 1 2 --checkpoint-hist 1 --epochs 3',
        'early stop': '--early-stop 1 --epochs 4 --lr 0',
        'no validation': '--val-split ""',
        'unreadable images': '--data-dir {data}/damaged --val-bad-image skip',
    },
    'ranks': {
        '2 ranks, EMA': f'{EMA} --dist-bn broadcast',
        '2 ranks, BatchNorm apart': '--dist-bn ""',
        '2 ranks, accumulation': '--grad-accum-steps 2',
        '2 ranks, SAM': '--sam 0.05',
        '2 ranks, repeated augmentation': '--aug-repeats 2',
        '2 ranks, ML-Decoder, unfrozen later': f'{HEAD} --freeze-backbone --unfreeze-epoch 1',
        '2 ranks, text queries': f'several {WORDS} {SPLIT} --num-classes 60',
        '2 ranks, 3 views': '--aug-splits 3',
    },
    'sharded': {
        '2 ranks, FSDP, EMA': f'{FSDP} {EMA}',
        '2 ranks, FSDP, the better of both': f'{FSDP} {EMA} --better-of-ema',
        '2 ranks, FSDP, ML-Decoder': f'{FSDP} {HEAD} --opt adamw',
        '2 ranks, FSDP, accumulation, clipped norm': f'{FSDP} --grad-accum-steps 2 --clip-grad 1 --opt lamb',
        '2 ranks, FSDP, autocast bfloat16': f'{FSDP} --amp --amp-dtype bfloat16 {EMA}',
        '2 ranks, FSDP, milestones, 1 checkpoint': f'{FSDP} --save-epochs 1 2 --checkpoint-hist 1',
    },
}


def flags(group: str, name: str, data: str) -> list[str]:
    """Return the arguments of train.py for a configuration."""
    own = GROUPS[group][name]
    base = SEVERAL if own.startswith('several ') else SINGLE
    given = shlex.split(own.removeprefix('several ').format(data=data))
    arguments = shlex.split(base.format(data=data))
    if '--data-dir' in given:
        del arguments[0]
    return [*arguments, *given]
