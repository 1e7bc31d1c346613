"""Multi-label and zero-shot metrics, exact across ranks."""

from timm_mldecoder.metrics.multilabel import MultiLabelEvaluator, average_precision, best_thresholds
from timm_mldecoder.metrics.zero_shot import ZeroShotEvaluator

__all__ = ['MultiLabelEvaluator', 'ZeroShotEvaluator', 'average_precision', 'best_thresholds']
