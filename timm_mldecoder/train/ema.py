"""How much of the initial weights is left in the EMA weights of a short run."""

import logging

from timm_mldecoder.flags import Options

_logger = logging.getLogger(__name__)

SHARE = 0.1  # of the initial weights in the final EMA weights, above which they are not those of a trained model
_CHOICES = {'model_ema_decay', 'model_ema_warmup', 'better_of_ema'}


def choose_ema_warmup(options: Options, steps: int) -> Options:
    """Return the options of a run of `steps` optimizer steps, with a warmup of the EMA decay where it needs one.

    Without warmup, decay ** steps of the initial weights are left in the end. Where that is much, a run that was given
    neither a decay, a warmup nor the better of both gets the warmup, and any other run that ranks by the EMA weights a
    warning.
    """
    share = options.model_ema_decay**steps
    if not options.model_ema or options.model_ema_warmup or options.better_of_ema or share <= SHARE:
        return options
    numbers = (
        f'--model-ema-decay {options.model_ema_decay:g} leaves {share:.0%} of the initial weights in the EMA weights '
        f'after the {steps} optimizer steps of this run'
    )
    if not options.given & _CHOICES:
        _logger.warning(
            f'{numbers}: using --model-ema-warmup; --no-model-ema-warmup or a decay of your own prevents it'
        )
        return options.replace(model_ema_warmup=True)
    if not options.model_ema_force_cpu:  # else epochs are ranked by the raw weights
        _logger.warning(
            f'{numbers}, which epochs are ranked by: pass --model-ema-warmup, --better-of-ema or a smaller decay'
        )
    return options
