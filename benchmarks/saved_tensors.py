"""Where the head's training memory goes: what a forward pass keeps for the backward pass, by the tensors' size.

    python -m benchmarks.saved_tensors [--device cuda]

1000 classes, K = 100, 49 tokens, batch 16; parameters and features are left out. The last row is the most that a
training step holds, over what the backward pass must read.
"""

from collections import Counter

import torch
from torch import nn

from benchmarks.measure import MIB, autocast, markdown, parser, peak_memory, training
from benchmarks.peers import ReferenceHead
from timm_mldecoder import MLDecoder

CLASSES, QUERIES, TOKENS, BATCH, WIDTH, DIM, HEADS, HIDDEN = 1000, 100, 49, 16, 2048, 768, 8, 2048
# elements an image -> what it is
TENSORS = {
    TOKENS * WIDTH: 'copy of the features, N x F',
    TOKENS * DIM: 'embedded tokens, keys, values, N x D',
    TOKENS * 2 * DIM: 'embedded tokens, keys, values, N x D',
    HEADS * QUERIES * TOKENS: 'attention weights, heads x K x N',
    QUERIES * DIM: 'queries on their way, K x D',
    QUERIES * HIDDEN: 'hidden layer, K x 2048',
}
HEADER = ('kept, batch 16', 'ours, MiB', 'reference, MiB')


def main(argv: list[str] | None = None) -> str:
    args = parser(__doc__, rounds=1).parse_args(argv)
    heads = MLDecoder(CLASSES, QUERIES), ReferenceHead(CLASSES, QUERIES, WIDTH)
    side = int(TOKENS**0.5)
    features = torch.randn(BATCH, WIDTH, side, side, device=args.device, requires_grad=True)
    kept = [_kept(head.to(args.device), features) for head in heads]
    names = [*dict.fromkeys(TENSORS.values()), 'the rest']
    rows = [[name, *(mib[name] for mib in kept)] for name in names]
    totals = [sum(mib.values()) for mib in kept]
    peaks = [peak_memory(training(head, features), args.device) for head in heads]
    ratios = [peak / total for peak, total in zip(peaks, totals, strict=True)]
    return markdown(HEADER, [*rows, ['all', *totals], ['most of a training step', *peaks], ['over all', *ratios]])


def _kept(head: nn.Module, features: torch.Tensor) -> Counter:
    """MiB by the names of `TENSORS`; what shares storage is counted once, parameters and features not at all."""
    seen = {t.untyped_storage().data_ptr() for t in (*head.parameters(), *head.buffers(), features)}
    alive, mib = [], Counter()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            alive.append(storage)  # so that its address is not given to another
            name = TENSORS.get(storage.nbytes() / tensor.element_size() / BATCH, 'the rest')
            mib[name] += storage.nbytes() / MIB
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(features):
        head.train()(features)
    return mib


if __name__ == '__main__':
    print(main())
