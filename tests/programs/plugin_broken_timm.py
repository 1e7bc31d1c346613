"""torch works beside a timm that does not; prints how a request for a head fails."""

import torch

try:
    import timm

    assert timm.create_model('resnet18', num_classes=3) == {'num_classes': 3}
    print(timm.create_model('resnet18', ml_decoder=True))
except Exception as error:
    print(type(error).__name__, error)
assert torch.ones(2).sum() == 2
