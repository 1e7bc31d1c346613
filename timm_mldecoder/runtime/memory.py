"""Peak memory, and out-of-memory errors as advice about the batch size."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from timm_mldecoder.runtime.errors import RunFailed

# What torch raises on a CPU as a plain RuntimeError; the last is oneDNN's, for its own scratch memory.
_CPU_MESSAGES = ("can't allocate memory", 'not enough memory', 'could not create a primitive')
_ONE_VALUE = 'Expected more than 1 value per channel'  # torch's BatchNorm


def peak_memory(device: torch.device) -> str:
    """Return the peak of memory so far, in MB: of the device, or of the process on a CPU."""
    if device.type == 'cuda':
        used = torch.cuda.max_memory_allocated(device)
    else:
        import resource  # POSIX only

        unit = 1 if sys.platform == 'darwin' else 1024
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f'{used / 2**20:.0f}MB'


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _CPU_MESSAGES)


@contextmanager
def advise_on_memory(batch_size: int, validation_batch_size: int, grad_accum_steps: int) -> Iterator[None]:
    """Turn out-of-memory errors in training into a RunFailed with advice about the batch size.

    Raises:
        ValueError: If BatchNorm gets a single value per channel, as of one image of one pixel.
    """
    try:
        yield
    except ValueError as error:
        if _ONE_VALUE not in str(error):
            raise
        raise ValueError(
            f'--batch-size {batch_size}: BatchNorm needs several values per channel in training: take at least 2 '
            'images per rank, larger images, or a model without BatchNorm'
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(
            f'out of memory with --batch-size {batch_size} (--validation-batch-size {validation_batch_size}): reduce '
            f'it and raise --grad-accum-steps (now {grad_accum_steps}) by the same factor, or try --amp or '
            '--grad-checkpointing'
        ) from error
