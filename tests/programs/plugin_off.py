"""Switched off by the environment, timm is left alone until the package is imported."""

import sys

import timm

assert not [name for name in sys.modules if name.startswith('timm_mldecoder')]
try:
    timm.create_model('test_resnet', ml_decoder=True)
except TypeError as error:
    assert 'ml_decoder' in str(error)
else:
    raise SystemExit('the option was taken')

import timm_mldecoder  # noqa: E402

assert type(timm.create_model('test_resnet', ml_decoder=True).fc) is timm_mldecoder.MLDecoder
