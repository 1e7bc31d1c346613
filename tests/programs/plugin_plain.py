"""Prints timm's models built without a head; with an argument, ``ml_decoder`` has its value."""

import json
import sys

import timm
import torch

options = {'ml_decoder': json.loads(sys.argv[1])} if len(sys.argv) > 1 else {}
for name in ('test_resnet', 'test_vit', 'test_convnext'):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options)
    print(type(model).__qualname__, type(model).__module__, [name for name, _ in model.named_modules()])
    print({name: value.double().sum().item() for name, value in model.state_dict().items()})
