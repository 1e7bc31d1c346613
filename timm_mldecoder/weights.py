"""Former place of `timm_mldecoder.checkpoints`, kept so that imports written for it still work."""

from timm_mldecoder.checkpoints.published import convert_state_dict, head_options
from timm_mldecoder.checkpoints.read import read_checkpoint

__all__ = ['convert_state_dict', 'head_options', 'read_checkpoint']
