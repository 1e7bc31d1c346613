"""Loads the files of weights_write.py: the trained model, and its backbone under fresh heads."""

import timm
import torch

model = timm.create_model('test_resnet', num_classes=5, ml_decoder=True, checkpoint_path='trained.pth')
assert torch.equal(model.eval()(torch.ones(1, 3, 64, 64)), torch.load('logits.pth'))
backbone = torch.load('backbone.pth')
for classes in (1000, 7):
    model = timm.create_model(
        'test_resnet',
        pretrained=True,
        num_classes=classes,
        ml_decoder=True,
        pretrained_cfg_overlay=dict(file='backbone.pth'),
    )
    own = model.state_dict()
    same = {name for name in own if name in backbone and torch.equal(own[name], backbone[name])}
    assert same == {name for name in backbone if not name.startswith('fc.')}, classes
    assert model(torch.ones(1, 3, 64, 64)).shape == (1, classes)
