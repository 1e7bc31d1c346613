"""How the ranks of a run hold its model: replicated (DDP) or sharded (FSDP2, torch.distributed.checkpoint).

The run, its loop and its state work with a `Layout`, and do not know which of the two it is. Tasks are timm's
`TrainingTask`, of which torch's types do not know the attributes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_mldecoder.distributed.fsdp import ShardedEma, broadcast_buffers, create_mesh, create_skeleton, shard
from timm_mldecoder.distributed.world import World
from timm_mldecoder.distributed.write_sharded import ShardWriter, localize
from timm_mldecoder.flags.model import EmaOptions
from timm_mldecoder.flags.options import LayoutOptions
from timm_mldecoder.runtime.signals import StopSignals

Content = dict[str, Any]  # of a checkpoint


class Layout:
    """The interface of both layouts, with what a single process needs."""

    reads_whole = True  # whether each rank reads whole checkpoints

    def __init__(self, options: LayoutOptions, world: World) -> None:
        self._options = options
        self._world = world

    def create(self, create: Callable[[bool], nn.Module]) -> nn.Module:
        """Create the model by a function of whether to load weights."""
        return create(True)

    def place(self, model: nn.Module, heads: Sequence[nn.Module]) -> None:
        """Move the model to the devices of the ranks, in place.

        Args:
            heads: Its classifiers, one or two.
        """
        model.to(self._world.device)

    def setup_ema(self, task: Any, options: EmaOptions) -> None:
        """Create the EMA weights of a task, equal to those of the model."""
        self._world.share(task.get_trainable_module())  # else EMA weights start from what each rank has drawn
        task.setup_ema(
            decay=options.model_ema_decay,
            use_warmup=options.model_ema_warmup,
            device='cpu' if options.model_ema_force_cpu else None,
        )

    def wrap(self, task: Any) -> None:
        """Let the ranks exchange the gradients of the parameters that are trainable now."""
        if not self._world.distributed:
            return
        devices = None if self._world.device.type == 'cpu' else [self._world.device]
        buffers = dict(broadcast_buffers=False) if self._options.no_ddp_bb else {}
        task.prepare_distributed(device_ids=devices, **buffers)

    def rewrap(self, task: Any) -> None:
        """`wrap` again, after parameters have become trainable."""
        if self._world.distributed:
            task.trainable_module = task.trainable_module.module
            self.wrap(task)

    def begin_step(self, model: nn.Module) -> None:
        """Prepare the model for the first batch of an optimizer step; a collective call."""

    def whole(self, tensor: Any) -> Tensor:
        """Return a result of sharded tensors, such as the norm of the gradients, with its value of all ranks."""
        return tensor

    def until_stopped(self, batches: Iterable, signals: StopSignals) -> Iterator:
        """Yield batches up to the one during which a signal arrives."""
        return signals.until_stopped(batches)

    def open_folder(self, folder: Path | None) -> None:
        """Take the folder of the run, None on all ranks but the first; a collective call."""

    def save(self, content: Content, write: Callable[[Content], Any], position: tuple[int, int]) -> Any:
        """Save a checkpoint: the first rank writes what all have collected; a collective call.

        Args:
            position: Epochs done and batches of the next.

        Returns:
            What `write` returned, None if it is not called on this rank, or not yet.
        """
        return write(content) if self._world.primary else None

    def poll(self) -> None:
        """Complete the checkpoint that is being saved, if it can be by now."""

    def wait(self) -> Any:
        """Complete the checkpoint that is being saved, and return what its `write` returned."""

    def localize(
        self, content: Content, path: Path, models: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
    ) -> None:
        """Give a checkpoint that was read from `path` the tensors to restore on this rank, in place."""


class Sharded(Layout):
    """Every rank holds a shard of each parameter, gradient, optimizer state and EMA weight."""

    reads_whole = False

    def create(self, create: Callable[[bool], nn.Module]) -> nn.Module:
        return create(True) if self._world.primary else create_skeleton(lambda: create(False))

    def place(self, model: nn.Module, heads: Sequence[nn.Module]) -> None:
        self._average = shard(model, heads, create_mesh(self._options, self._world), self._options, self._world)

    def setup_ema(self, task: Any, options: EmaOptions) -> None:
        assert self._average is not None
        task.trainable_module_ema = ShardedEma(
            self._average, self._world.device, decay=options.model_ema_decay, use_warmup=options.model_ema_warmup
        )

    def wrap(self, task: Any) -> None:
        pass

    def rewrap(self, task: Any) -> None:
        pass

    def begin_step(self, model: nn.Module) -> None:
        if not self._options.no_ddp_bb:
            broadcast_buffers(model)

    def whole(self, tensor: Any) -> Tensor:
        return tensor.full_tensor()

    def until_stopped(self, batches: Iterable, signals: StopSignals) -> Iterator:
        for batch in batches:  # a forward pass waits for all ranks
            yield batch
            if self._world.all_reduce_max(signals.received)[0]:
                return

    def open_folder(self, folder: Path | None) -> None:
        self._writer = ShardWriter(Path(self._world.broadcast(str(folder and folder.resolve()))), self._world)

    def save(self, content: Content, write: Callable[[Content], Any], position: tuple[int, int]) -> Any:
        self._writer.save(content, write, position)

    def poll(self) -> None:
        self._writer.poll()

    def wait(self) -> Any:
        return self._writer.wait()

    def localize(
        self, content: Content, path: Path, models: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
    ) -> None:
        localize(content, path, models, optimizer)


def create_layout(options: LayoutOptions, world: World) -> Layout:
    """Return the layout that the options request; a single process holds the whole model."""
    return (Sharded if options.parallel == 'fsdp' and world.distributed else Layout)(options, world)
