"""Small readers shared by the formats."""

from collections import Counter
from pathlib import Path


def read_names(path: Path) -> list[str]:
    """Names of a text file, one a line.

    Raises:
        ValueError: If a name is repeated, or there is none.
    """
    names = [line.strip() for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated or not names:
        raise ValueError(f'{path}: expected one distinct name a line, got {len(names)} lines, repeated: {repeated}.')
    return names
