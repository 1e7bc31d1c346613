"""What timm does without an ML-Decoder: build, train, save, load, extract features. Prints a digest of every result."""

import hashlib
import sys
import tempfile
from pathlib import Path

import timm
import torch

if 'activate' in sys.argv:
    import timm_mldecoder

    timm_mldecoder.plugin.activate()


def digest(tensors):
    return hashlib.sha256(b''.join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


for name in ('test_resnet', 'test_vit'):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, drop_rate=0.1)
    images = torch.randn(2, 3, 160, 160)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(images).square().mean().backward()
        optimizer.step()
    print(name, type(model), model._model_args, model.pretrained_cfg)
    print(digest(model.state_dict().values()), digest([model.eval()(images)]))
    with tempfile.TemporaryDirectory() as folder:
        timm.models.save_for_hf(model, folder)
        print(Path(folder, 'config.json').read_text())
        for classes in (7, 3):
            again = timm.create_model('local-dir:' + folder, pretrained=True, num_classes=classes)
            print(type(again), digest(again.state_dict().values()))
    features = timm.create_model(name, features_only=True)
    print(type(features), digest(features(images)))
