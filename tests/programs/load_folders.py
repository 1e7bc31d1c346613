"""Loads the stored models of the folders in its arguments, and writes their logits for x.pt to y.pt."""

import sys

import timm
import torch

for folder in sys.argv[1:]:
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert list(model.pretrained_cfg['label_names']) == list('abcdefg')
    torch.save(model(torch.load(f'{folder}/x.pt')), f'{folder}/y.pt')
