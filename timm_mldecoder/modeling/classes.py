"""The classes of a model: names, label embeddings of text queries, tuned thresholds."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_mldecoder.data import class_to_index
from timm_mldecoder.data.word_embeddings import read_word_embeddings
from timm_mldecoder.flags.data import ClassesOptions
from timm_mldecoder.head import MLDecoder


class Classes(NamedTuple):
    """Classes of a head with text queries: label embeddings [C, E], and their names if they have any."""

    embeddings: Tensor
    names: list[str] | None


def read_classes(path: str, dataset: Dataset) -> Classes:
    """Return the label embeddings of the classes of a dataset, in its order.

    Raises:
        ValueError: If the dataset does not name its classes, or the file has not all of them.
    """
    names = class_to_index(dataset)
    if names is None:
        raise ValueError('--word-embeddings needs the names of the classes, which this dataset does not report')
    return Classes(*read_word_embeddings(path, list(names)))


def stored_words(options: ClassesOptions, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a head whose classes are those of a checkpoint, or are set once it is built."""
    embeddings = stored_embeddings(weights)
    if embeddings is None and options.word_embeddings:
        embeddings = read_word_embeddings(options.word_embeddings)[0]
    return {} if embeddings is None else dict(word_embeddings=embeddings.shape[1])


def stored_embeddings(weights: Mapping[str, Any]) -> Tensor | None:
    """Return the label embeddings [C, E] of a head in a state dict, None if it has none."""
    return next((tensor for name, tensor in weights.items() if name.endswith('vocabulary.embeddings')), None)


def class_names_of(dataset: Any) -> list[str] | None:
    """Return the class names of a dataset in order, None if it does not report them."""
    classes = class_to_index(dataset)
    return list(classes) if classes else None


def set_classes(model: Any, names: list[str] | None, word_embeddings: str = '') -> None:
    """Set the classes of a model with text queries, in order; None takes all of a file of label embeddings.

    Without a file they are picked among the model's own. A model without text queries is left as it is.

    Raises:
        ValueError: If a class has no embedding.
    """
    head = model.get_classifier()
    if not isinstance(head, MLDecoder) or head.vocabulary is None:
        return
    if word_embeddings:
        head.set_word_embeddings(*read_word_embeddings(word_embeddings, names))
    elif head.class_names and names:
        row = {name: index for index, name in enumerate(head.class_names)}
        missing = [name for name in names if name not in row]
        if missing:
            raise ValueError(f'the model has no embedding of {", ".join(missing)}: pass --word-embeddings')
        head.set_word_embeddings(head.vocabulary.embeddings[[row[name] for name in names]], names)


@contextmanager
def other_classes(model: nn.Module, classes: Classes | None) -> Iterator[None]:
    """Give a model with text queries other classes for a while; None leaves it as it is.

    Raises:
        ValueError: If its head has learned parts that do not fit so many classes.
    """
    if classes is None:
        yield
        return
    head: Any = next(module for module in model.modules() if isinstance(module, MLDecoder))
    # the very tensors are restored: DistributedDataParallel keeps references to them
    own = dict(head.vocabulary.named_buffers())
    head.set_word_embeddings(*classes)
    try:
        yield
    finally:
        for name, tensor in own.items():
            setattr(head.vocabulary, name, tensor)


def thresholds_for(content: Mapping[str, Any], names: list[str] | None) -> Tensor | None:
    """Return the tuned thresholds in a checkpoint for these classes, [C]; None if it has none for some of them."""
    stored = content.get('thresholds')
    if not stored or not names or any(name not in stored for name in names):
        return None
    return torch.tensor([stored[name] for name in names])
