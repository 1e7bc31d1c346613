"""Running out of memory, told by the option that decides how much is needed."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from timm_mldecoder.engine.runtime.failure import RunFailed

# what torch says on a CPU, where it raises a plain RuntimeError; the last is oneDNN's, for its own scratch memory
_ON_CPU = ("can't allocate memory", 'not enough memory', 'could not create a primitive')


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ON_CPU)


@contextmanager
def naming_batch_size(options: Namespace) -> Iterator[None]:
    """Turn running out of memory while training into a `RunFailed` that names the batch size and what helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        validation = options.validation_batch_size or options.batch_size
        raise RunFailed(
            f'out of memory with --batch-size {options.batch_size} (--validation-batch-size {validation}): make it '
            f'smaller and --grad-accum-steps (now {options.grad_accum_steps}) larger by as much, or try --amp or '
            f'--grad-checkpointing'
        ) from error
