"""Random streams: captured, restored, and started anew with every epoch.

The first epoch goes on with the streams that built the model, draw for draw as in timm's script. Every later one starts
from (seed, epoch, rank), so that a run resumed there draws what the undisturbed run drew.
"""

import random
from typing import Any

import numpy as np
import torch
from timm.utils import random_seed

#: States of the generators of python, numpy and torch: plain types that a weights-only load accepts.
Streams = dict[str, Any]


def capture(accelerator: bool = True) -> Streams:
    """The state of this process's generators, those of the accelerator too unless in a loader process."""
    version, words, gauss = random.getstate()
    kind, key, position, has_gauss, cached = np.random.get_state()
    streams = {
        'python': (version, np.array(words, dtype=np.uint32).tobytes(), gauss),
        'numpy': (kind, key.tobytes(), int(position), int(has_gauss), float(cached)),
        'torch': torch.get_rng_state().numpy().tobytes(),
    }
    if accelerator and torch.cuda.is_available():
        streams['cuda'] = torch.cuda.get_rng_state().numpy().tobytes()
    return streams


def restore(streams: Streams) -> None:
    """Put the generators of this process back to where `capture` found them."""
    version, words, gauss = streams['python']
    random.setstate((version, tuple(np.frombuffer(words, dtype=np.uint32).tolist()), gauss))
    kind, key, *rest = streams['numpy']
    np.random.set_state((kind, np.frombuffer(key, dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(streams['torch']))
    if 'cuda' in streams and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(streams['cuda']))


def start_epoch(seed: int, epoch: int, rank: int) -> None:
    """Start the streams of an epoch on one rank."""
    random_seed(int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1)[0]))


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
