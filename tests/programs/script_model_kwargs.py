"""Reads --model-kwargs and builds the model as timm's train.py, validate.py and benchmark.py do; imports timm alone.

Each argument of this program is a JSON list of arguments of such a script; prints a JSON line per list.
"""

import argparse
import json
import sys

import timm
from timm.utils import ParseKwargs

parser = argparse.ArgumentParser()
parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
for line in sys.argv[1:]:
    args = parser.parse_args(json.loads(line))
    try:
        model = timm.create_model(
            'test_resnet',
            pretrained=False,
            in_chans=3,
            num_classes=7,
            drop_rate=0.0,
            drop_path_rate=None,
            global_pool=None,
            scriptable=False,
            checkpoint_path='',
            **args.model_kwargs,
        )
        head = model.get_classifier()
        print(json.dumps([type(head).__name__, head.weight.shape[0]]))  # classes of a Linear, groups of an MLDecoder
    except ValueError as error:
        print(json.dumps(['ValueError', str(error)]))
