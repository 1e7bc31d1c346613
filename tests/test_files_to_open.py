"""How many files a reader opens to follow one idea: the files of the package that run between its door and its end.

A profiler records every function of ours that is called, from the call of the door up to the end of the idea. Counted
is each file with at least one such function, modules that are only imported and `if TYPE_CHECKING` not. Left out is
what runs beside every idea, in `BESIDE`: it is understood without being opened. The bounds are what was reached:
a change that needs another file has to say here why.
"""

import sys
from collections.abc import Callable

import torch
from runs import ROOT, write_data

from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags import train_options
from timm_mldecoder.train.build_run import build_run
from timm_mldecoder.train.loop import fit, train_epoch

PACKAGE = f'{ROOT}/timm_mldecoder/'
BESIDE = (
    'flags/',  # an option is read
    'distributed/world.py',  # ranks exchange a value
    'runtime/log.py',  # a log line
    'plugin.py:_FactoryFinder',  # something is imported
)


class Trace:
    """Files entered from the call of `door` to the call of `end`, or with `returns` to its return."""

    def __init__(self, door: str, end: str, returns: bool = False) -> None:
        self.door, self.end, self.event = door, end, 'return' if returns else 'call'
        self.files: dict[str, set[str]] = {}
        self.state = 'before'

    def __call__(self, frame, event: str, argument) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or code.co_name == '<module>' or self.state == 'after':
            return
        file = code.co_filename.removeprefix(PACKAGE)
        function = f'{file}:{code.co_qualname if sys.version_info >= (3, 11) else code.co_name}'
        if self.state == 'before' and event == 'call' and function.endswith(self.door):
            self.state = 'within'
        if self.state == 'within' and event == 'call' and not function.startswith(BESIDE):
            self.files.setdefault(file, set()).add(function.rpartition(':')[2])
        if self.state == 'within' and event == self.event and function.endswith(self.end):
            self.state = 'after'

    def follow(self, call: Callable):
        previous = sys.getprofile()
        sys.setprofile(self)
        try:
            return call()
        finally:
            sys.setprofile(previous)


def options_of(tmp_path, **more):
    small = dict(model='test_resnet', img_size=32, num_classes=3, batch_size=4, workers=0, device='cpu', no_aug=True)
    data = tmp_path / 'data'
    return train_options(
        data=str(data if data.exists() else write_data(data)),
        **{**small, 'epochs': 1, 'use_ml_decoder_head': 1, 'output': str(tmp_path), 'experiment': 'run', **more},
    )


def build(options):
    return build_run(options, World(torch.device('cpu')))


def at_most(limit: int, *traces: Trace) -> None:
    assert all(trace.state == 'after' for trace in traces)
    files = {file: functions for trace in traces for file, functions in trace.files.items()}
    assert len(files) <= limit, '\n'.join(f'{file}: {", ".join(sorted(found))}' for file, found in files.items())


def test_from_the_flag_to_the_head(tmp_path):
    """From the function of a training run that creates the model to the constructor of the head."""
    trace = Trace('train/build_run.py:_create_model', 'head/ml_decoder.py:MLDecoder.__init__')
    trace.follow(lambda: build(options_of(tmp_path))).close()
    at_most(8, trace)


def test_from_a_file_on_disk_to_logits(tmp_path):
    """From the iteration over the loader, which opens the image, to what the head returns in the training step."""
    run = build(options_of(tmp_path))
    trace = Trace('loading/loader.py:TrainLoader.__iter__', 'head/ml_decoder.py:MLDecoder.forward', returns=True)
    trace.follow(lambda: train_epoch(run))
    run.close()
    at_most(10, trace)


def test_a_checkpoint_is_written_and_resumed(tmp_path):
    """What the loop calls at the end of an epoch, and what a run that resumes calls before it trains.

    The model is timm's own: an ML-Decoder head brings `_load_from_state_dict`, which torch calls, in a file more.
    """
    written = Trace('train/run.py:Run.save_epoch', 'train/run.py:Run.save_epoch', returns=True)
    written.follow(lambda: fit(build(options_of(tmp_path, use_ml_decoder_head=0))))
    resumed = Trace('checkpoint/state.py:resume', 'checkpoint/state.py:resume', returns=True)
    resumed.follow(lambda: build(options_of(tmp_path, use_ml_decoder_head=0, epochs=2, resume='auto'))).close()
    at_most(6, written, resumed)
