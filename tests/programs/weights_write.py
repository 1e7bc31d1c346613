"""Writes the weights of a plain backbone, and those and the logits of a model with a head."""

import timm
import torch

torch.manual_seed(0)
torch.save(timm.create_model('test_resnet').state_dict(), 'backbone.pth')
torch.manual_seed(1)
model = timm.create_model('test_resnet', num_classes=5, ml_decoder=True).eval()
torch.save(model.state_dict(), 'trained.pth')
torch.save(model(torch.ones(1, 3, 64, 64)), 'logits.pth')
