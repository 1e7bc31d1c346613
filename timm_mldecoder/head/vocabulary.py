"""The classes of a head with text queries: label embeddings, which may change after training, and names."""

import logging
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_logger = logging.getLogger(__name__)


class Vocabulary(nn.Module):
    """Label embeddings [C, E], and their augmentation in training (arXiv 2111.12933, section 2.3.3).

    Embeddings and names are both buffers (names as UTF-8 bytes), so that classes are saved, moved and copied with the
    model: state dicts, ``.to()``, EMA weights, folders of ``save_for_hf``.

    Loading a state dict also loads its classes if this vocabulary has no classes yet, or the same: as many, and with
    the same names if both have names. Otherwise this vocabulary keeps its classes, so that a checkpoint trained on
    other classes can be loaded.

    Args:
        embeddings: [C, E]; or the width E alone, if a state dict or `set` will give the embeddings.
        num_classes: Number of classes C.
        class_names: A distinct name for each class; without embeddings they come with a state dict of these classes.
        random_queries: Number of random embeddings appended in training; their target is positive
            (`timm_mldecoder.losses` has a wrapper that adds it).
        query_noise: Gaussian noise on the embeddings in training, relative to their root mean square.
        query_cutout: Probability that an entry of an embedding is zero in training, without rescaling the others; no
            figure of the paper has it.

    Raises:
        ValueError: If an option is out of range, or for the reasons of `set`.
    """

    def __init__(
        self,
        embeddings: Tensor | int,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        random_queries: int = 0,
        query_noise: float = 0.0,
        query_cutout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if random_queries < 0 or query_noise < 0:
            raise ValueError(f'random_queries and query_noise must be at least 0, got {random_queries}, {query_noise}')
        if not 0 <= query_cutout < 1:
            raise ValueError(f'query_cutout must be in [0, 1), got {query_cutout}')
        width = embeddings if isinstance(embeddings, int) else embeddings.shape[-1] if embeddings.dim() else 0
        if width < 1:
            raise ValueError(f'word_embeddings must be [C, E], or a width E of at least 1, got {embeddings}')
        self.random_queries = random_queries
        self.query_noise = query_noise
        self.query_cutout = query_cutout
        self.known = False  # whether the embeddings have been set
        self.embeddings: Tensor
        self.names_utf8: Tensor
        self.register_buffer('embeddings', torch.zeros(num_classes, width, device=device, dtype=dtype))
        self.register_buffer('names_utf8', torch.empty(0, device=device, dtype=torch.uint8))
        if not isinstance(embeddings, int):
            if len(embeddings) != num_classes:
                raise ValueError(f'word_embeddings have {len(embeddings)} classes, num_classes is {num_classes}')
            self.set(embeddings, class_names)
        elif class_names is not None:
            check_names(class_names, num_classes)
            self._set_names(class_names)

    @property
    def num_classes(self) -> int:
        return self.embeddings.shape[0]

    @property
    def width(self) -> int:
        return self.embeddings.shape[1]

    @property
    def class_names(self) -> list[str] | None:
        """Names in the order of the classes, None if there are none, or on the meta device."""
        if not len(self.names_utf8) or self.names_utf8.is_meta:
            return None
        return bytes(self.names_utf8.tolist()).decode().split('\n')

    def set(self, embeddings: Tensor, class_names: Sequence[str] | None = None) -> None:
        """Change the classes: their number, order and identity.

        Raises:
            ValueError: If embeddings are not finite floats [C, E] of the same width E, or names not C distinct lines.
        """
        check_embeddings(embeddings, self.width, class_names)
        self.embeddings = embeddings.detach().to(self.embeddings, copy=True)
        self._set_names(class_names or ())
        self.known = self.embeddings.device.type != 'meta'

    def _set_names(self, class_names: Sequence[str]) -> None:
        utf8 = list('\n'.join(class_names).encode())
        self.names_utf8 = torch.tensor(utf8, dtype=torch.uint8, device=self.embeddings.device)

    def reset_parameters(self) -> None:
        """Fill the buffers of a vocabulary without classes; the embeddings of known classes are data and stay."""
        if not self.known:
            self.embeddings.zero_()
            self.names_utf8 = self.names_utf8.new_empty(0)

    def forward(self) -> Tensor:
        """The embeddings that queries are made from: [C, E]; in training [C + random_queries, E], augmented."""
        if not self.known:
            raise RuntimeError('this head does not have its classes yet: load a checkpoint, or set_word_embeddings')
        embeddings = self.embeddings
        if not self.training or not (self.random_queries or self.query_noise or self.query_cutout):
            return embeddings
        scale = embeddings.square().mean().sqrt()
        if self.query_noise:
            embeddings = embeddings + self.query_noise * scale * torch.randn_like(embeddings)
        if self.query_cutout:
            embeddings = embeddings * (torch.rand_like(embeddings) >= self.query_cutout)
        if self.random_queries:
            random = embeddings.new_empty(self.random_queries, self.width).normal_()
            embeddings = torch.cat([embeddings, scale * random])
        return embeddings

    def _apply(self, fn, recurse: bool = True) -> 'Vocabulary':
        super()._apply(fn, recurse)
        self.known = self.known and self.embeddings.device.type != 'meta'
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        names, embeddings = (state_dict.get(prefix + name) for name in ('names_utf8', 'embeddings'))
        if names is not None and embeddings is not None and embeddings.shape[-1] == self.width:
            if self._accepts(embeddings, names):
                # load_state_dict needs buffers of the right shape
                self.embeddings = self.embeddings.new_empty(embeddings.shape)
                self.names_utf8 = self.names_utf8.new_empty(names.shape)
                self.known = embeddings.device.type != 'meta'
            else:
                _logger.info(f'keeping the {self.num_classes} classes; the state dict has {len(embeddings)}')
                own = {prefix + 'embeddings': self.embeddings, prefix + 'names_utf8': self.names_utf8}
                state_dict = {**state_dict, **own}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _accepts(self, embeddings: Tensor, names: Tensor) -> bool:
        if not self.known:
            return True
        both_named = len(self.names_utf8) and len(names)
        return len(embeddings) == self.num_classes and (
            not both_named or torch.equal(names, self.names_utf8.to(names.device))
        )

    def extra_repr(self) -> str:
        augmentation = f', random_queries={self.random_queries}, query_noise={self.query_noise}'
        augmentation += f', query_cutout={self.query_cutout}'
        return f'num_classes={self.num_classes}, width={self.width}' + augmentation * self.training


def check_embeddings(embeddings: Tensor, width: int, class_names: Sequence[str] | None) -> None:
    """Raise ValueError unless `embeddings` are finite floats [C, width] and `class_names` C distinct lines or None."""
    if embeddings.dim() != 2 or not embeddings.is_floating_point() or not len(embeddings):
        raise ValueError(
            f'word_embeddings must be floats [C, E], got {embeddings.dtype} of shape {tuple(embeddings.shape)}'
        )
    if embeddings.shape[1] != width:
        raise ValueError(
            f'word_embeddings must have the width {width} that the head was built with, got {embeddings.shape[1]}'
        )
    if class_names is not None:
        check_names(class_names, len(embeddings))
    bad = (~embeddings.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        which = [class_names[index] for index in bad] if class_names is not None else bad
        raise ValueError(f'word_embeddings of these classes are not finite: {which}')


def check_names(class_names: Sequence[str], num_classes: int) -> None:
    """Raise ValueError unless `class_names` are distinct lines, one per class."""
    if isinstance(class_names, str) or len(class_names) != num_classes:
        raise ValueError(f'{num_classes} class names are needed, one per embedding, got {class_names!r:.200}')
    invalid = [name for name in class_names if not name.strip() or '\n' in name]
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if invalid or repeated:
        raise ValueError(
            f'class names must be distinct single lines; repeated: {repeated}; blank or of several lines: {invalid}'
        )
