"""Zero-shot runs: heads that ask with word embeddings, trained on some classes and scored on others.

A split file (`--class-split`) divides the classes of a data set. Training sees images with a seen class, and the seen
classes only. Evaluation scores the seen and the unseen ones, in this order.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_mldecoder.data import MultiLabelDataset, create_dataset
from timm_mldecoder.data.class_split import read_class_split, select_classes
from timm_mldecoder.data.word_embeddings import read_word_embeddings
from timm_mldecoder.engine.flags.zero_shot import scores_both
from timm_mldecoder.engine.input.dataset_checks import class_to_index
from timm_mldecoder.head import MLDecoder


class Classes(NamedTuple):
    """What a head of word queries is asked: label embeddings [C, E], and their names if they have any."""

    embeddings: Tensor
    names: list[str] | None


def has_words(options: Namespace) -> bool:
    """Whether the options ask for a head of word queries."""
    return bool(options.use_ml_decoder_head and options.word_embeddings)


def select(options: Namespace, dataset: Dataset, training: bool) -> None:
    """Leave a data set with the classes that `--class-split` and `--score-classes` give it.

    Raises:
        ValueError: If the data set is not multi-label, or the split does not fit it.
    """
    if not options.class_split:
        return
    if not isinstance(dataset, MultiLabelDataset):
        raise ValueError(f'--class-split is for multi-label data; --dataset {options.dataset} has one class an image')
    split = read_class_split(options.class_split, dataset.class_names)
    names = split.seen if training else getattr(split, options.score_classes)
    dataset.annotations = select_classes(dataset.annotations, names, only_positive=training)
    dataset.num_seen = len(split.seen) if scores_both(options) and not training else None


def training_head(options: Namespace) -> dict[str, Any]:
    """The options of the head for the classes to train on; none without `--word-embeddings`.

    Raises:
        ValueError: If unseen classes are to be scored by a head that cannot be asked for them.
    """
    if not has_words(options):
        if options.class_split and options.score_classes != 'seen':
            raise ValueError(
                '--class-split: only word queries can be asked for unseen classes; pass --word-embeddings '
                'with --use-ml-decoder-head 1, or --score-classes seen'
            )
        return {}
    dataset = create_dataset(options.dataset, options.data_dir, options.train_split, class_map=options.class_map)
    select(options, dataset, training=True)
    classes = read_classes(options, dataset)
    return dict(
        word_embeddings=classes.embeddings,
        class_names=classes.names,
        random_queries=options.random_queries,
        query_noise=options.query_noise,
    )


def stored_head(options: Namespace, weights: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a head whose classes are those of a checkpoint, or come once it is built."""
    for name, tensor in (weights or {}).items():
        if name.endswith('vocabulary.embeddings'):
            return dict(word_embeddings=tensor.shape[1])
    if options.word_embeddings:
        return dict(word_embeddings=read_word_embeddings(options.word_embeddings)[0].shape[1])
    return {}


def read_classes(options: Namespace, dataset: Dataset) -> Classes:
    """The label embeddings of the classes of a data set, in its order.

    Raises:
        ValueError: If the data set does not name its classes, or the file of `--word-embeddings` lacks some.
    """
    names = class_to_index(dataset)
    if names is None:
        raise ValueError(f'--word-embeddings needs the names of the classes, which {options.dataset} does not tell')
    return Classes(*read_word_embeddings(options.word_embeddings, list(names)))


def set_classes(options: Namespace, model: nn.Module, dataset: Dataset) -> None:
    """Ask a model with word queries for the classes of a data set: by `--word-embeddings`, else among its own.

    Raises:
        ValueError: If a class has no embedding.
    """
    head = model.get_classifier()
    if getattr(head, 'vocabulary', None) is None:
        return
    if options.word_embeddings:
        head.set_word_embeddings(*read_classes(options, dataset))
    elif head.class_names and class_to_index(dataset):
        row = {name: index for index, name in enumerate(head.class_names)}
        missing = [name for name in class_to_index(dataset) if name not in row]
        if missing:
            raise ValueError(f'the model has no embedding of {", ".join(missing)}: pass --word-embeddings')
        wanted = list(class_to_index(dataset))
        head.set_word_embeddings(head.vocabulary.embeddings[[row[name] for name in wanted]], wanted)
    options.num_classes = head.num_classes


@contextmanager
def asked_for(model: nn.Module, classes: Classes | None) -> Iterator[None]:
    """Ask a model for other classes for a while; None leaves it as it is.

    Raises:
        ValueError: If its head has learned parts that do not know so many classes.
    """
    if classes is None:
        yield
        return
    head = next(module for module in model.modules() if isinstance(module, MLDecoder))
    # put back as they are: DistributedDataParallel holds on to the very tensors that it found
    own = dict(head.vocabulary.named_buffers())
    head.set_word_embeddings(*classes)
    try:
        yield
    finally:
        for name, tensor in own.items():
            setattr(head.vocabulary, name, tensor)
