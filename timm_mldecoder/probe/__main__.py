"""Train and compare heads on a frozen backbone.

    python -m timm_mldecoder.probe DATA --model MODEL --pretrained --heads linear,attention_pool,ml_decoder_small
    python -m timm_mldecoder.probe DATA --model MODEL --pretrained --cache FOLDER --lrs 1e-3,3e-3,1e-2,3e-2 --seeds 3
    torchrun --nproc_per_node=8 -m timm_mldecoder.probe DATA --model MODEL --pretrained

One pass of the backbone per batch feeds every head at every learning rate with every seed. The best learning rate of
each head is chosen on the validation split; docs/probing.md describes the rest.
"""

import sys
from collections.abc import Sequence

from timm_mldecoder.distributed.world import join_world
from timm_mldecoder.probe.options import parse_probe
from timm_mldecoder.probe.sweep import probe
from timm_mldecoder.runtime.errors import run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Probe with the options of a command line."""
    options = parse_probe(__doc__, argv)
    with join_world(options.train.device, options.train.device_modules or ()) as world:
        probe(options, world)


if __name__ == '__main__':
    sys.exit(run_command(main))
