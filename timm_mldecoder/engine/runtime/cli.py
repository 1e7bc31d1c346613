"""What the scripts share at their edge: logging, and errors that are no bug told in one line."""

import logging
import os
import sys
from collections.abc import Callable

from timm.utils import setup_default_logging

from timm_mldecoder.engine.runtime import signals
from timm_mldecoder.engine.runtime.failure import RunFailed

USER_ERROR = 2  # what argparse exits with too
FAILURE = 1
INTERRUPTED = 130  # Ctrl-C before there was anything to save


def run(main: Callable[[], None]) -> int:
    """Call `main` and return the exit code of the process.

    It is 2 where the user made a mistake and 1 where the run could not go on or the disk failed, told in one line each;
    a run that a signal stopped exits by itself, see `signals`.
    """
    rank = os.environ.get('RANK') or os.environ.get('SLURM_PROCID', '0')
    setup_default_logging(logging.INFO if rank == '0' else logging.WARNING)
    logging.captureWarnings(True)
    try:
        main()
    except signals.Stopped:
        signals.ignore()
        raise
    except ValueError as error:
        return _tell(error, USER_ERROR, rank)
    except (RunFailed, OSError) as error:
        return _tell(error, FAILURE, rank)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _tell(error: Exception, code: int, rank: str) -> int:
    where = '' if rank == '0' else f' (rank {rank})'
    print(f'{os.path.basename(sys.argv[0])}: error{where}: {" ".join(str(error).split())}', file=sys.stderr)
    return code
