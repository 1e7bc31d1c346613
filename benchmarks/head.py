"""The head alone: time and peak memory of MLDecoder against its matrix products, the reference's algorithm and a full
transformer decoder.

    python -m benchmarks.head [--device cuda] [--peers products]

A training step is forward and backward, gradients of the features included. Memory is the most a training step holds
above parameters and features. The products alone are the floor: same shapes and dtype, without bias, norm, activation,
softmax, dropout and residual, and without what autograd costs.
"""

from argparse import Namespace
from statistics import median

import torch
from torch import nn

from benchmarks.measure import inference, markdown, paired_times, parser, peak_memory, ratio, training
from benchmarks.peers import FullDecoder, Products, ReferenceHead
from timm_mldecoder import MLDecoder

WIDTH = 2048
PEERS = ('products', 'reference', 'full')
CASES = ((80, 80), (1000, 100), (9605, 200))  # classes, queries
TOKENS = (49, 196)
HEADER = (
    'classes, K, tokens, batch',
    *('inference, ms', '/ products', '/ reference', '/ full decoder'),
    *('training, ms', '/ products', '/ reference', '/ full decoder'),
    *('memory, MiB', '/ reference', '/ full decoder'),
)
# One query a class and self-attention among them: 9605 classes would take 3 GB an image for its scores alone.
FULL_DECODER_CLASSES = 1000


def main(argv: list[str] | None = None) -> str:
    flags = parser(__doc__, rounds=5)
    flags.add_argument('--batch-sizes', type=int, nargs='+', help='default: 1 and 16, on CUDA 1 and 128')
    flags.add_argument('--cases', type=int, nargs=2, action='append', metavar=('CLASSES', 'K'), help='default: three')
    flags.add_argument('--peers', nargs='+', choices=PEERS, default=PEERS, help='what to measure against')
    flags.add_argument('--tokens', type=int, nargs='+', default=TOKENS, help='of a square feature map')
    args = flags.parse_args(argv)
    batch_sizes = args.batch_sizes or ((1, 128) if args.device == 'cuda' else (1, 16))
    rows = [
        _row(num_classes, num_queries, tokens, batch_size, args)
        for num_classes, num_queries in args.cases or CASES
        for tokens in args.tokens
        for batch_size in batch_sizes
    ]
    return markdown(HEADER, rows)


def _row(num_classes: int, num_queries: int, tokens: int, batch_size: int, args: Namespace) -> list:
    device = args.device
    heads: dict[str, nn.Module] = {'ours': MLDecoder(num_classes, num_queries, initial_num_features=WIDTH)}
    if 'reference' in args.peers:
        heads['reference'] = ReferenceHead(num_classes, num_queries, WIDTH)
    # The full decoder is an order of magnitude slower: at batch 1 only, where its ratio is the same.
    if 'full' in args.peers and num_classes <= FULL_DECODER_CLASSES and (batch_size == 1 or device == 'cuda'):
        heads['full'] = FullDecoder(num_classes, WIDTH)
    side = int(tokens**0.5)
    features = torch.randn(batch_size, WIDTH, side, side, device=device)
    if device == 'cuda':
        features = features.bfloat16().contiguous(memory_format=torch.channels_last)
    asking = features.clone().requires_grad_()  # a backbone below wants the gradient

    row = [f'{num_classes:,}, {num_queries}, {tokens}, {batch_size}']
    for step, x in ((inference, features), (training, asking)):
        steps = {name: step(head.to(device), x) for name, head in heads.items()}
        if 'products' in args.peers:
            steps['products'] = Products(features, num_classes, num_queries, training=step is training)
        times = paired_times(steps, args.rounds, device)
        row.append(1e3 * median(times['ours']))
        row += [ratio(times['ours'], times[peer]) if peer in times else None for peer in PEERS]
    memory = {name: peak_memory(training(head, asking), device) for name, head in heads.items()}
    row.append(memory['ours'])
    return row + [memory['ours'] / memory[peer] if peer in memory else None for peer in ('reference', 'full')]


if __name__ == '__main__':
    print(main())
