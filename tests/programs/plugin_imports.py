"""Imports the modules of its arguments in order, then builds a model with a head; prints the type of its classifier."""

import importlib
import sys

for name in sys.argv[1:]:
    importlib.import_module(name)

import timm  # noqa: E402

print(type(timm.create_model('test_resnet', ml_decoder=True, num_classes=5).get_classifier()).__name__)
