"""``create_model`` imported before the plug-in is activated takes the option after."""

from timm import create_model
from timm.models import create_model as also

import timm_mldecoder

timm_mldecoder.plugin.activate()
for create in (create_model, also):
    assert type(create('test_resnet', ml_decoder=True).fc) is timm_mldecoder.MLDecoder
