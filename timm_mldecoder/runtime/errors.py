"""Errors that users see in one line, out-of-memory ones as advice about the batch size, and exit codes."""

import argparse
import ctypes
import io
import logging
import os
import platform
import select
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from timm.utils import setup_default_logging

from timm_mldecoder.runtime import signals

USER_ERROR = 2  # as argparse exits
FAILURE = 1
INTERRUPTED = 130  # Ctrl-C before there is anything to save
NO_READER = 141  # the program that read our output has ended, as `head` does; what SIGPIPE gives other programs

# What torch raises on a CPU as a plain RuntimeError; the last is oneDNN's, for its own scratch memory.
_CPU_MESSAGES = ("can't allocate memory", 'not enough memory', 'could not create a primitive')
_ONE_VALUE = 'Expected more than 1 value per channel'  # torch's BatchNorm


class RunFailed(RuntimeError):
    """A run that cannot continue, through no mistake in its options; exit code 1."""


class CommandParser(argparse.ArgumentParser):
    """An argparse parser whose errors are ValueErrors of one line, where argparse prints the usage and exits.

    It takes no abbreviations: `--ml-decoder` would be `--ml-decoder-kwargs`. `--help-all` is `--help`.
    """

    def __init__(self, prog: str | None, description: str | None, add_help: bool = True, **settings: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog, description=description, formatter_class=formatter, add_help=add_help, allow_abbrev=False, **settings
        )
        if add_help:
            self.add_argument('--help-all', action='help', help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix('argument '))


def run_command(main: Callable[[], None]) -> int:
    """Call `main` and return the exit code of the process.

    The code is 2 for a user's mistake and 1 for a failed run or disk, each reported in one line. A run that a signal
    stopped exits with its own code, see `signals.Stopped`.
    """
    rank = os.environ.get('RANK') or os.environ.get('SLURM_PROCID', '0')
    setup_default_logging(logging.INFO if rank == '0' else logging.WARNING)
    logging.captureWarnings(True)
    warnings.formatwarning = _format_warning  # type: ignore[assignment]  # typeshed names its arguments otherwise
    warnings.filterwarnings('once', 'This DataLoader will create')  # from several lines of torch, once per loader
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be valid Unicode
            stream.reconfigure(errors='backslashreplace')
    keep_freed_memory()
    try:
        main()
        if sys.stdout is not None:  # None where it was closed
            sys.stdout.flush()
    except signals.Stopped:
        signals.ignore()
        raise
    except ValueError as error:
        return _report(error, USER_ERROR, rank)
    except (RunFailed, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            return NO_READER
        return _report(error, FAILURE, rank)
    except SystemExit:  # after --help
        if _reader_has_left():
            return NO_READER
        raise
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _reader_has_left() -> bool:
    """Return whether stdout is a pipe without a reader; what is left to write is then dropped."""
    if not isinstance(sys.stdout, io.TextIOWrapper) or not hasattr(select, 'poll'):
        return False
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)  # errors alone
    if not pipe.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _report(error: Exception, code: int, rank: str) -> int:
    where = '' if rank == '0' else f' (rank {rank})'
    folder, name = os.path.split(sys.argv[0])
    name = f'{os.path.basename(folder)}.py' if name == '__main__.py' else name  # of a command that is a folder
    print(f'{name}: error{where}: {one_line(error)}', file=sys.stderr)
    return code


def _format_warning(message: Warning, category: type, filename: str, lineno: int, line: str | None = None) -> str:
    """Format a warning in one line, without the line of code that it comes from."""
    return f'{filename}:{lineno}: {category.__name__}: {one_line(message)}'


def one_line(error: Exception, limit: int | None = None) -> str:
    """Return the message of an error with its line breaks replaced, cut to `limit` characters."""
    return ' '.join(str(error).split())[:limit]


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


# parameters of mallopt: size from which malloc maps memory anew, free memory that it returns to the system
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_SETTINGS = ('MALLOC_', 'GLIBC_TUNABLES')  # environment variables of glibc's malloc


def keep_freed_memory() -> None:
    """Let malloc keep freed memory for the next step, instead of returning it and faulting in new pages.

    Only on Linux with glibc, whose malloc otherwise maps every tensor above 32 MiB at most anew, and not where
    environment variables set malloc up. See `man mallopt`.
    """
    if platform.libc_ver()[0] != 'glibc' or any(name.startswith(_SETTINGS) for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if not libc.mallopt(_M_MMAP_THRESHOLD, 2**30):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most before glibc 2.35
    libc.mallopt(_M_TRIM_THRESHOLD, 2**30)
