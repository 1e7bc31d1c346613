"""Train heads x learning rates x seeds side by side: one pass of the backbone per batch feeds them all.

Every rank gets the features of the whole batch and trains its part of the runs, so that the number of ranks changes
neither a run nor its BatchNorm statistics. A run depends on its own head, rate and seed alone, not on the others. Runs
of the same head share what does not depend on its weights: tokens are pooled and normalized once for all of them.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.task import ClassificationEvaluator
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags.options import TrialOptions
from timm_mldecoder.loading.randomness import STEP, key, seed_all
from timm_mldecoder.losses import RandomQueryLoss
from timm_mldecoder.modeling.classes import Classes, other_classes
from timm_mldecoder.models.probes import NormalizedProbe
from timm_mldecoder.probe.features import Batch, Source, read_together, scoring_groups, training_groups
from timm_mldecoder.probe.options import HeadSpec
from timm_mldecoder.runtime.log import logged
from timm_mldecoder.train.optim import timm_optimizer

_logger = logging.getLogger(__name__)

WARMUP = 0.1  # share of the steps; the cosine decay to 0 follows


@dataclass
class Run:
    """One head at one learning rate with one seed."""

    spec: HeadSpec
    rate: float  # its largest learning rate
    seed: int  # its seed, from 0
    head: Any = None  # the module, None on ranks that do not train it
    optimizer: Any = None
    parameters: int = 0  # number of parameters of the head
    seconds: float = 0.0  # time of its steps so far
    losses: list[float] = field(default_factory=list)  # mean training loss of each epoch
    # metrics on the validation split by epoch; None where its logits are not finite
    metrics: dict[int, dict[str, float] | None] = field(default_factory=dict)

    def result(self) -> dict:
        """Return what other ranks need to know."""
        return dict(parameters=self.parameters, seconds=self.seconds, losses=self.losses, metrics=self.metrics)


@dataclass
class Trainer:
    """Trains and scores the runs of this rank."""

    options: TrialOptions  # of train.py
    runs: list[Run]  # runs to train; this rank builds and trains every `world.size`-th
    build: Callable[[HeadSpec], nn.Module]
    loss: nn.Module
    evaluator: Callable[[], ClassificationEvaluator]
    world: World
    read_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.loss.to(self.world.device)
        self.begin(self.runs)

    def begin(self, runs: list[Run]) -> None:
        """Build the heads of the next runs to train; those of earlier ones stay."""
        self.runs, self.own = runs, runs[self.world.rank :: self.world.size]
        for run in self.own:
            seed_all(self.options.seed + run.seed)
            run.head = self.build(run.spec).to(self.world.device).train()
            run.parameters = sum(parameter.numel() for parameter in run.head.parameters())
            run.optimizer = timm_optimizer(self.options.replace(lr=run.rate), run.head)
            _fuse(run.optimizer, self.world.device)
        self._groups = _by_head(self.own)
        for first, *others in self._groups:
            for run in others:
                _share_statistics(first.head, run.head)

    def train(self, source: Source, number: int, score: Callable[[int], None]) -> None:
        """Train for all epochs on a number of images; a collective call.

        `score` is called with the epoch after each `--val-interval` epochs, and after the last.

        Raises:
            ValueError: If not even one batch is full.
        """
        options, size = self.options, self.options.batch_size * self.world.size
        steps = number // size
        if not steps:
            raise ValueError(
                f'--batch-size {options.batch_size} on {self.world.size} rank(s) exceeds the {number} images; reduce it'
            )
        for epoch in range(options.epochs):
            sums = [torch.zeros((), device=self.world.device) for _ in self.own]
            groups = training_groups(number, size, options.seed, epoch)
            batches = logged(f'Epoch {epoch}', read_together(source, groups, self.world), steps)
            for index in range(steps):
                start = time.perf_counter()
                batch = next(batches)
                self._wait()
                self.read_seconds += time.perf_counter() - start
                step = epoch * steps + index
                factor = learning_rate_factor(step, options.epochs * steps)
                for total, loss in zip(sums, self.step(batch, step, factor), strict=True):
                    total += loss
            for run, total in zip(self.own, sums, strict=True):
                run.losses.append(total.item() / steps)
            if (epoch + 1) % options.val_interval == 0 or epoch + 1 == options.epochs:
                score(epoch)
        self._share_results()

    def step(self, batch: Batch, step: int, factor: float) -> list[Tensor]:
        """Take one optimizer step of each run of this rank, and return their losses.

        The number of the step determines the draws of dropout; `factor` multiplies the learning rates.
        """
        losses: dict[int, Tensor] = {}
        for group in self._groups:
            start = time.perf_counter()
            with torch.no_grad():
                features = group[0].head.features(batch.tokens, batch.class_token)
            for runs in _together(group):
                losses |= zip(map(id, runs), self._step(runs, features, batch.target, step, factor), strict=True)
            self._wait()
            for run in group:
                run.seconds += (time.perf_counter() - start) / len(group)
        return [losses[id(run)] for run in self.own]

    def _step(self, runs: list[Run], features: Tensor, target: Tensor, step: int, factor: float) -> list[Tensor]:
        seed_all(key(STEP, self.options.seed, runs[0].seed, step))  # several draw no random numbers
        for run in runs:
            for group in run.optimizer.param_groups:
                group['lr'] = run.rate * factor
            run.optimizer.zero_grad()
        head = runs[0].head
        randomized = self.options.random_queries and getattr(head, 'vocabulary', None) is not None
        loss = RandomQueryLoss(self.loss) if randomized else self.loss
        losses = [loss(logits, target) for logits in head.classify_all([run.head for run in runs], features)]
        torch.stack(losses).sum().backward()
        for run in runs:
            if self.options.clip_grad is not None:
                dispatch_clip_grad(run.head.parameters(), self.options.clip_grad, mode=self.options.clip_mode)
            run.optimizer.step()
        return [loss.detach() for loss in losses]

    @torch.no_grad()
    def score(
        self, source: Source, number: int, runs: Sequence[Run], classes: Classes | None = None
    ) -> dict[int, dict[str, float] | None]:
        """Score runs on a split of a number of images; a collective call.

        Returns:
            The metrics of each of the runs that this rank trains, by its `id`; None where logits are not finite.
        """
        own = [run for run in runs if run.head is not None]
        evaluators = {id(run): self.evaluator() for run in own}
        finite = dict.fromkeys(evaluators, True)
        batches = scoring_groups(number, self.options.batch_size * self.world.size)
        for batch in logged('Scoring', read_together(source, batches, self.world), len(batches)):
            for group in _by_head(own):
                for run in group:
                    run.head.eval()
                features = group[0].head.features(batch.tokens, batch.class_token)
                for runs in _together(group):
                    heads = [run.head for run in runs]
                    text = getattr(heads[0], 'vocabulary', None) is not None
                    with other_classes(heads[0], classes if text else None):
                        several = heads[0].classify_all(heads, features)
                    for run, logits in zip(runs, several, strict=True):
                        finite[id(run)] &= bool(logits.isfinite().all())
                        evaluators[id(run)].update(logits.nan_to_num(0.0), batch.target)
                for run in group:
                    run.head.train()
        return {
            name: dict(evaluator.compute(distributed=False)) if finite[name] else None
            for name, evaluator in evaluators.items()
        }

    def _share_results(self) -> None:
        """Give every rank the results of all runs."""
        gathered = self.world.all_gather([run.result() for run in self.own])
        for rank, results in enumerate(gathered):
            for run, result in zip(self.runs[rank :: self.world.size], results, strict=True):
                vars(run).update(result)

    def _wait(self) -> None:
        """Wait for the device, so that times are those of the work that they name."""
        if self.world.device.type != 'cpu':
            torch.accelerator.synchronize(self.world.device)


def _by_head(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs that have the same head, in their order."""
    labels = dict.fromkeys(run.spec.label for run in runs)
    return [[run for run in runs if run.spec.label == label] for label in labels]


def _together(group: list[Run]) -> list[list[Run]]:
    """Divide runs of the same head into those that are computed together."""
    return [group] if group[0].head.stacked else [[run] for run in group]


def _fuse(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let torch's optimizers take a step in one kernel, where they can and no other way was chosen."""
    for group in optimizer.param_groups if device.type in ('cpu', 'cuda') else ():
        if 'fused' in group and group['fused'] is None and not group['foreach']:
            group['fused'] = True


def _share_statistics(head: nn.Module, other: nn.Module) -> None:
    """Give a head the BatchNorm statistics of another one's features, which are those of the same batches."""
    if isinstance(head, NormalizedProbe):
        for name, buffer in head.norm.named_buffers():
            setattr(other.norm, name, buffer)


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the factor of the learning rate in a step: linear warmup, then a cosine to 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass(frozen=True)
class Choice:
    """The best learning rate of a head."""

    spec: HeadSpec
    runs: list[Run]  # its runs at that rate, one per seed
    # mean metric on the validation split of each rate, over the seeds; None where a run diverged
    tried: dict[float, float | None]

    @property
    def rate(self) -> float:
        return self.runs[0].rate

    @property
    def at_end(self) -> bool:
        """Whether the best rate is the lowest or highest of several, so that a better one may lie outside."""
        return len(self.tried) > 1 and self.rate in (min(self.tried), max(self.tried))

    def best(self, metric: str) -> Run:
        """Return the run with the best score on the validation split."""
        return max(self.runs, key=lambda run: _rank(_final(run, metric), metric))


def choose(runs: Sequence[Run], metric: str) -> list[Choice]:
    """Return the choice of each head: the rate with the best mean metric on the validation split over the seeds."""
    choices = []
    for label in dict.fromkeys(run.spec.label for run in runs):
        by_rate: dict[float, list[Run]] = {}
        for run in runs:
            if run.spec.label == label:
                by_rate.setdefault(run.rate, []).append(run)
        tried = {rate: _mean([_final(run, metric) for run in same]) for rate, same in by_rate.items()}
        ranks = {rate: _rank(score, metric) for rate, score in tried.items()}
        rate = max(ranks, key=ranks.__getitem__)
        choices.append(Choice(by_rate[rate][0].spec, by_rate[rate], tried))
    return choices


def further_runs(choices: Sequence[Choice], given: Sequence[float], most: int, seeds: int) -> list[Run]:
    """Return the runs that extend the range of rates of each head whose best rate is at an end of it.

    Args:
        choices: The best learning rates so far.
        given: Learning rates that every head was trained at; the range grows by the ratio of the last two.
        most: Rates beyond these that a head may get.
        seeds: Runs of a rate.
    """
    runs = []
    for choice in choices:
        rates = sorted(choice.tried)
        if not choice.at_end or choice.tried[choice.rate] is None or len(rates) - len(given) >= most:
            continue
        end, neighbor = rates[:2] if choice.rate == rates[0] else rates[:-3:-1]
        runs += [Run(choice.spec, end * end / neighbor, seed) for seed in range(seeds)]
    return runs


def _final(run: Run, metric: str) -> float | None:
    metrics = run.metrics[max(run.metrics)]
    return None if metrics is None else metrics[metric]


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return statistics.mean(finite) if len(finite) == len(values) else None


def _rank(value: float | None, metric: str) -> float:
    if value is None:
        return -math.inf
    return -value if metric == 'loss' else value
