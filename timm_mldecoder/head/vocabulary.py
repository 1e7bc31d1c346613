"""The classes of a zero-shot head: label embeddings that may change after training, and their names."""

import logging
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_logger = logging.getLogger(__name__)


class Vocabulary(nn.Module):
    """Label embeddings [C, E] of any number of classes, and what training does to them (section 2.3.3).

    Both the embeddings and the names are buffers (the names as UTF-8 bytes), so that whatever carries a model's
    tensors - a state dict, ``.to()``, an averaged copy, a folder of ``save_for_hf`` - carries its classes too.

    A state dict brings its classes along if this vocabulary has none yet, or the same: as many, and of the same names
    where both have names. Otherwise this vocabulary keeps its own, so that a checkpoint trained on other classes loads.

    Args:
        embeddings: [C, E]; or the width E alone, for embeddings that a state dict or `set` will bring.
        num_classes: number of classes C.
        class_names: a distinct name for each class.
        random_queries: in training, so many random embeddings come after those of the classes; their target is
            positive (`timm_mldecoder.losses` has a wrapper that adds it).
        query_noise: in training, fresh Gaussian noise on the embeddings, relative to their root mean square.

    Raises:
        ValueError: see `set`; or an option out of range.
    """

    def __init__(
        self,
        embeddings: Tensor | int,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        random_queries: int = 0,
        query_noise: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if random_queries < 0 or query_noise < 0:
            raise ValueError(f'random_queries and query_noise must be at least 0, got {random_queries}, {query_noise}')
        width = embeddings if isinstance(embeddings, int) else embeddings.shape[-1] if embeddings.dim() else 0
        if width < 1:
            raise ValueError(f'word_embeddings must be [C, E], or a width E of at least 1, got {embeddings}')
        self.random_queries = random_queries
        self.query_noise = query_noise
        self.known = False  # whether the embeddings have been given
        self.register_buffer('embeddings', torch.zeros(num_classes, width, device=device, dtype=dtype))
        self.register_buffer('names_utf8', torch.empty(0, device=device, dtype=torch.uint8))
        if not isinstance(embeddings, int):
            if len(embeddings) != num_classes:
                raise ValueError(f'word_embeddings are of {len(embeddings)} classes, num_classes is {num_classes}')
            self.set(embeddings, class_names)
        elif class_names is not None:
            raise ValueError('class_names need the word_embeddings of the classes, not only their width')

    @property
    def num_classes(self) -> int:
        return self.embeddings.shape[0]

    @property
    def width(self) -> int:
        return self.embeddings.shape[1]

    @property
    def class_names(self) -> list[str] | None:
        """Names in the order of the classes, None if they were never given."""
        return bytes(self.names_utf8.tolist()).decode().split('\n') if len(self.names_utf8) else None

    def set(self, embeddings: Tensor, class_names: Sequence[str] | None = None) -> None:
        """Change the classes: their number, order and identity.

        Raises:
            ValueError: embeddings that are not finite [C, E] of the old width E; names that are not C distinct lines.
        """
        check_embeddings(embeddings, self.width, class_names)
        names = '\n'.join(class_names or ()).encode()
        self.embeddings = embeddings.detach().to(self.embeddings, copy=True)
        self.names_utf8 = torch.tensor(list(names), dtype=torch.uint8, device=self.embeddings.device)
        self.known = self.embeddings.device.type != 'meta'

    def forward(self) -> Tensor:
        """The embeddings to ask with: [C, E]; in training noisy, and [C + random_queries, E]."""
        if not self.known:
            raise RuntimeError('this head does not know its classes yet: load a checkpoint, or set_word_embeddings')
        words = self.embeddings
        if not self.training or not (self.random_queries or self.query_noise):
            return words
        scale = words.square().mean().sqrt()
        if self.query_noise:
            words = words + self.query_noise * scale * torch.randn_like(words)
        if self.random_queries:
            words = torch.cat([words, scale * words.new_empty(self.random_queries, self.width).normal_()])
        return words

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        names, embeddings = (state_dict.get(prefix + name) for name in ('names_utf8', 'embeddings'))
        if names is not None and embeddings is not None and embeddings.shape[-1] == self.width:
            if self._takes(embeddings, names):
                # make room for as many classes as there are
                self.embeddings = self.embeddings.new_empty(embeddings.shape)
                self.names_utf8 = self.names_utf8.new_empty(names.shape)
                self.known = embeddings.device.type != 'meta'
            else:
                _logger.info(f'The head keeps its own {self.num_classes} classes; the weights have {len(embeddings)}.')
                own = {prefix + 'embeddings': self.embeddings, prefix + 'names_utf8': self.names_utf8}
                state_dict = {**state_dict, **own}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _takes(self, embeddings: Tensor, names: Tensor) -> bool:
        if not self.known:
            return True
        both_named = len(self.names_utf8) and len(names)
        return len(embeddings) == self.num_classes and (
            not both_named or torch.equal(names, self.names_utf8.to(names.device))
        )

    def extra_repr(self) -> str:
        augmentation = f', random_queries={self.random_queries}, query_noise={self.query_noise}'
        return f'num_classes={self.num_classes}, width={self.width}' + augmentation * self.training


def check_embeddings(embeddings: Tensor, width: int, class_names: Sequence[str] | None) -> None:
    """Raise ValueError unless `embeddings` are finite floats [C, width] and `class_names` C distinct lines or None."""
    if embeddings.dim() != 2 or not embeddings.is_floating_point() or not len(embeddings):
        raise ValueError(
            f'word_embeddings must be floats [C, E], got {embeddings.dtype} of shape {tuple(embeddings.shape)}'
        )
    if embeddings.shape[1] != width:
        raise ValueError(f'word_embeddings must be {width} wide, as the head was built, got {embeddings.shape[1]}')
    if class_names is not None:
        if isinstance(class_names, str) or len(class_names) != len(embeddings):
            raise ValueError(f'{len(embeddings)} class names are needed, one an embedding, got {class_names!r:.200}')
        odd = [name for name in class_names if not name.strip() or '\n' in name]
        repeated = [name for name, count in Counter(class_names).items() if count > 1]
        if odd or repeated:
            raise ValueError(f'class names must be distinct lines; repeated: {repeated}; blank or longer: {odd}')
    bad = (~embeddings.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        which = [class_names[index] for index in bad] if class_names is not None else bad
        raise ValueError(f'word_embeddings of these classes are not finite: {which}')
