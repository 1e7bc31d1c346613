"""train.py in one process, on the batches of two ranks joined: that of one after that of the other."""

import sys
from collections.abc import Iterator

from timm_mldecoder.loading import create_loaders as loaders
from timm_mldecoder.loading.randomness import Draw, EpochBatches
from timm_mldecoder.runtime.errors import run_command
from train import main


class JoinedBatches(EpochBatches):
    def __iter__(self) -> Iterator[list[Draw]]:
        ranks = [EpochBatches(self.order, self.batch_size // 2, rank, 2) for rank in range(2)]
        for rank in ranks:
            rank.begin(self.epoch)
        for first, second in zip(*ranks, strict=True):
            yield [*first, *second]


if __name__ == '__main__':
    loaders.EpochBatches = JoinedBatches
    sys.exit(run_command(main))
