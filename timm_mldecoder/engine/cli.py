"""What the scripts share at their edge: logging, and a user's mistake told in one line."""

import logging
import os
import sys
from collections.abc import Callable

from timm.utils import setup_default_logging

USER_ERROR = 2  # what argparse exits with too


def run(main: Callable[[], None]) -> int:
    """Call `main` and return the exit code of the process: 2, and one line, where the user made a mistake."""
    rank = os.environ.get('RANK', '0')
    setup_default_logging(logging.INFO if rank == '0' else logging.WARNING)
    logging.captureWarnings(True)
    try:
        main()
    except ValueError as error:
        where = '' if rank == '0' else f' (rank {rank})'
        print(f'{os.path.basename(sys.argv[0])}: error{where}: {" ".join(str(error).split())}', file=sys.stderr)
        return USER_ERROR
    return 0
