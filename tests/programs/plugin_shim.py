"""timm's deprecated module of the factory takes the option too."""

import warnings

warnings.simplefilter('ignore')
from timm.models.factory import create_model  # noqa: E402

print(type(create_model('test_resnet', ml_decoder=True).fc).__name__)
