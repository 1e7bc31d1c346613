"""The ML-Decoder head in plain torch; knows no timm model, no file format and no flag."""

from timm_mldecoder.head.ml_decoder import MLDecoder

__all__ = ['MLDecoder']
