"""Activation is idempotent."""

import sys

import timm.models._factory as factory

import timm_mldecoder

before = factory.model_entrypoint, len(sys.meta_path)
timm_mldecoder.plugin.activate()
timm_mldecoder.plugin.autoload()
assert before == (factory.model_entrypoint, len(sys.meta_path))
