"""Run every benchmark and write its table where docs/performance.md keeps it.

    python -m benchmarks.all [--device cuda] [--only head model ...] [-- flags of theirs]
    python -m benchmarks.all --summary

A table stands between `<!-- head cpu -->` and `<!-- end -->`; its command, machine and date go above it. The table of
aims at the top of the page is made from the others at the end, and printed; `--summary` does that alone.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.aims import summary
from benchmarks.measure import machine

PAGE = Path(__file__).parents[1] / 'docs' / 'performance.md'
DEVICES = {
    'head': ('cpu', 'cuda'),
    'operations': ('cpu', 'cuda'),
    'saved_tensors': ('cpu', 'cuda'),
    'model': ('cpu', 'cuda'),
    'table9': ('cpu', 'cuda'),
    'scaling': ('cpu', 'cuda'),
    'a2_step': ('cpu', 'cuda'),
    'million_classes': ('cpu', 'cuda'),
    'train_loop': ('cpu', 'cuda'),
    'validate_loop': ('cpu', 'cuda'),
    'startup': ('cpu',),  # the same with and without a GPU
    'million_images': ('cpu',),
}


def main(argv: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__.partition('\n')[0], allow_abbrev=False)
    flags.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    flags.add_argument('--only', nargs='+', choices=DEVICES, default=list(DEVICES))
    flags.add_argument('--page', type=Path, default=PAGE, help='the page to write to')
    flags.add_argument('--summary', action='store_true', help='run nothing, only make the table of aims')
    flags.add_argument('flags', nargs='*', help='after --: further flags of the benchmarks')
    args = flags.parse_args(argv)
    for name in (name for name in args.only if args.device in DEVICES[name] and not args.summary):
        start = time.perf_counter()
        command = ' '.join([f'python -m benchmarks.{name} --device {args.device}', *args.flags])
        # each in its own process, so that one's memory and threads are not the next one's
        table = subprocess.run(
            [sys.executable, *command.split()[1:]], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()
        write_table(args.page, f'{name} {args.device}', f'`{command}`, {machine(args.device)}\n\n{table}')
        print(f'{name}: {time.perf_counter() - start:.0f} s')
    aims = summary(args.page.read_text())
    write_table(args.page, 'aims', aims)
    print(aims)


def write_table(page: Path, label: str, text: str) -> None:
    """Put `text` in the page's place `label`.

    Raises:
        ValueError: if the page has no such place, or several.
    """
    place = re.compile(rf'(?<=<!-- {label} -->\n).*?(?=<!-- end -->)', re.DOTALL)
    content, count = place.subn(lambda _: f'{text}\n', page.read_text())
    if count != 1:
        raise ValueError(f'{page} has {count} places for "{label}": it needs one, "<!-- {label} -->" to "<!-- end -->"')
    page.write_text(content)


if __name__ == '__main__':
    main()
