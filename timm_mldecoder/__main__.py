"""The console command: `timm-mldecoder COMMAND ...` is `python -m timm_mldecoder.COMMAND ...`."""

import sys
from collections.abc import Sequence
from importlib import import_module

from timm_mldecoder.runtime.errors import run_command

#: Command -> the module whose `main` it runs, and what it does.
COMMANDS = {
    'check': ('timm_mldecoder.check.__main__', 'look at a dataset: unreadable files, copies, leaks, classes'),
    'train': ('timm_mldecoder.train.__main__', 'train a model'),
    'validate': ('timm_mldecoder.validate.__main__', 'evaluate a checkpoint or a pretrained model'),
    'predict': ('timm_mldecoder.predict.__main__', 'write labels, scores and features of images'),
    'convert': ('timm_mldecoder.convert', 'make a folder for timm and the Hugging Face hub'),
    'export': ('timm_mldecoder.export.__main__', 'export to ONNX, torch.export or AOTInductor'),
    'probe': ('timm_mldecoder.probe.__main__', 'train and compare heads on a frozen backbone'),
    'plot': ('timm_mldecoder.plot', 'draw the summaries of runs'),
    'app': ('timm_mldecoder.app', 'open a page to try models on images'),
    'embed': ('timm_mldecoder.data.embed', 'compute label embeddings of class names'),
    'label-graph': ('timm_mldecoder.label_graph', 'compute the label graph of a dataset'),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command with the arguments after its name.

    Raises:
        ValueError: If there is no such command, and for a user's mistake in its arguments.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ['--help']
    if name in ('-h', '--help'):
        lines = (f'  {command:12}{text}' for command, (_, text) in COMMANDS.items())
        print('usage: timm-mldecoder COMMAND [--help] ...\n\ncommands:', *lines, sep='\n')
        return
    if name not in COMMANDS:
        raise ValueError(f'{name}: no such command; choose one of {", ".join(COMMANDS)}')
    sys.argv = [f'timm-mldecoder {name}', *rest]
    import_module(COMMANDS[name][0]).main(rest)


def console() -> int:
    """Run the command of the process, and return its exit status."""
    return run_command(main)


if __name__ == '__main__':
    sys.exit(console())
