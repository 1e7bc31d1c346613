"""The entry point imports none of the large packages."""

import sys

from timm_mldecoder import plugin

plugin.autoload()
assert not {'timm', 'torch', 'numpy'} & set(sys.modules)
