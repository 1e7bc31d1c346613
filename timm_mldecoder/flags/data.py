"""Flags of the data: where it is, how it is loaded, image and batch sizes, evaluation images."""

import os
from dataclasses import dataclass

from timm_mldecoder.flags.flag import ON_ACCELERATOR, VALIDATES, Need, both, given, train, validate
from timm_mldecoder.flags.group import Group

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_CPUS = os.cpu_count() or 1


def with_dataset(*kinds: str) -> Need:
    """Need a kind of dataset."""
    return Need(lambda options: options.dataset.lower().startswith(kinds), f'--dataset {"..., ".join(kinds)}...')


# fmt: off
_STREAMED_KINDS = ('hfids/', 'tfds/', 'wds/')
STREAMED = with_dataset(*_STREAMED_KINDS)
NOT_STREAMED = Need(lambda o: not o.dataset.lower().startswith(_STREAMED_KINDS), 'a dataset that is not streamed')
_SIZES = given('train_img_sizes')
_PATCHES = given('naflex_loader')
_PATCH_SIZES = given('naflex_patch_sizes')
IMAGES_OF_ONE_SIZE = Need(lambda o: not o.naflex_loader, 'images of one size: no --naflex-loader, which crops nothing')
_SKIP = ('skip', 'abort')
WORKERS = Need(lambda o: o.workers > 0, '--workers above 0')
MULTILABEL = Need(lambda o: o.task == 'multilabel', '--task multilabel')
PROGRESSIVE = Need(lambda o: o.train_size_schedule == 'progressive', '--train-size-schedule progressive')
TEXT_QUERIES = Need(lambda o: bool(o.use_ml_decoder_head or o.graph), '--use-ml-decoder-head 1 or --graph')
FILES = Need(lambda o: not o.dataset.lower().startswith((*_STREAMED_KINDS, 'hfds/', 'torch/')), 'image files')
PILLOW = Need(lambda o: not o.tf_preprocessing, 'no --tf-preprocessing, which has its own crop')
NO_INPUT_SIZE = Need(lambda o: not o.input_size, 'no --input-size, which replaces it')


@dataclass(frozen=True)
class DatasetOptions(Group):
    """Dataset."""

    data: str | None = both(None, 'root folder of the dataset (or --data-dir)', names='data', nargs='?', metavar='DIR')
    data_dir: str | None = both(None, 'root folder of the dataset', metavar='DIR')
    dataset: str = both('', 'dataset as KIND or KIND/NAME, such as coco2014, torch/cifar100 or wds/name; if empty, a '
        'folder or tar file with one folder per class', inherited=True)
    train_split: str = train('train', 'name of the training split')
    val_split: str = train('validation', 'name of the validation split; "" trains without one')
    split: str = validate('validation', 'name of the split to evaluate')
    train_num_samples: int | None = train(None, 'number of training samples, for streaming datasets that do not '
        'report it', range='[1, inf)', needs=STREAMED)
    val_num_samples: int | None = train(None, 'number of validation samples, for streaming datasets that do not '
        'report it', range='[1, inf)', needs=(STREAMED, VALIDATES))
    num_samples: int | None = validate(None, 'number of samples, for streaming datasets that do not report it',
        range='[1, inf)', needs=STREAMED)
    dataset_download: bool = both(False, 'download missing torch/, hfids/ and tfds/ datasets',
        needs=with_dataset('torch/', 'hfids/', 'tfds/'))
    dataset_trust_remote_code: bool = both(False, 'run the code that comes with a Hugging Face dataset',
        needs=with_dataset('hfds/', 'hfids/'))
    cache_dir: str = both('', 'folder for the annotations of large files in compact form, where that of the dataset is '
        'read-only (default: .timm_mldecoder in it, else the cache of the user)', path='output folder', metavar='DIR')
    class_map: str = both('', 'file that lists the class names in the order of their indices', path='dataset file')
    voc_difficult: str | None = both(None, 'labels of Pascal-VOC that only difficult objects show; as VOC does '
        '(ignore) if not given', choices=('ignore', 'positive', 'negative'), needs=with_dataset('voc'))
    coco_unannotated: str = both('keep', 'COCO images without annotations: keep them, as negatives of every class, or '
        'drop them, as published results do', choices=('keep', 'drop'), needs=with_dataset('coco'), inherited=True)
    val_fraction: float = both(0.0, 'share of each class to hold out of the training split, for validation',
        range='[0, 0.5]', needs=VALIDATES, inherited=True, in_validate=dict(needs=()))
    split_seed: int = both(0, 'seed of --val-fraction', range='[0, inf)', needs=given('val_fraction'), inherited=True)
    split_column: str = both('', 'column of a CSV file, given as DIR, that names the split of each row',
        needs=with_dataset('csv'), inherited=True)
    path_column: str = both('', 'column of a CSV file that has the paths of images (default: path)',
        needs=with_dataset('csv'), inherited=True)
    label_column: str = both('', 'column of a CSV file that has the labels (default: labels), '
        'or columns of 0 and 1, with commas between',
        needs=with_dataset('csv'), inherited=True)
    label_separator: str = both('', 'what is between labels in a CSV file (default: ;) or a string of records '
        '(default: blanks), or list for lists such as [1, 2]', metavar='TEXT',
        needs=with_dataset('csv', 'hfds/', 'wds/'), inherited=True)
    partial_labels: str = train('', 'train on some of the labels, the others not annotated: fpc=N, N positive and N '
        'negative ones of each class, or rps=P, without a random share P of all', metavar='WAY', needs=MULTILABEL)
    input_img_mode: str | None = both(None, 'PIL mode that images are converted to, such as RGB or L', inherited=True)
    background: str = both('white', 'colour under transparent pixels, such as white or #808080', metavar='COLOUR',
        inherited=True)
    image_range: list[float] | None = both(None, 'values that become black and white in images of 16 bits, 32 bits or '
        'floats (default: 0 65535 for 16 bits, 0 1 for floats)', nargs=2, inherited=True)
    exif_rotate: bool = both(False, 'turn images upright as their EXIF tag says', inherited=True)
    input_key: str | None = both(None, 'key of the image in a dataset of records', metavar='KEY', inherited=True)
    target_key: str | None = both(None, 'key of the target in a dataset of records', metavar='KEY', inherited=True)
    task: str = both('classification', 'classification: one class per image; multilabel: any number of classes',
        choices=('classification', 'multilabel'), inherited=True)
    target_format: str = both('indices', 'multi-label targets: class indices, or one value per class',
        choices=('indices', 'multihot'), needs=MULTILABEL, inherited=True)
    multilabel_threshold: float = both(0.5, 'probability from which a label counts as predicted (F1)', range='[0, 1]',
        needs=MULTILABEL, inherited=True)



@dataclass(frozen=True)
class ClassesOptions(Group):
    """Text queries and zero-shot classes."""

    word_embeddings: str = both('', 'label embeddings, of which the queries are made (python -m '
        'timm_mldecoder.data.embed writes them)', path='file', needs=TEXT_QUERIES, inherited=True)
    class_split: str = both('', 'JSON file of seen and unseen classes: training uses the seen ones', path='file',
        inherited=True)
    score_classes: str = both('all', 'classes of --class-split to evaluate; all scores the unseen classes alone and '
        'together with the seen ones', choices=('all', 'seen', 'unseen'), needs=given('class_split'))
    random_queries: int = train(0, 'number of random text queries added in training, as positives', range='[0, 100000]',
        needs=given('word_embeddings'))
    query_noise: float = train(0.0, 'noise on the label embeddings in training, relative to their root mean square',
        range='[0, inf)', needs=given('word_embeddings'))
    query_cutout: float = train(0.0, 'probability that an entry of a label embedding is zero in training',
        range='[0, 1)', needs=given('word_embeddings'))



@dataclass(frozen=True)
class ImageOptions(Group):
    """Images."""

    img_size: int | None = both(None, 'image size in pixels; the default of the model if not given', range='[1, 8192]',
        in_validate=dict(needs=(NO_INPUT_SIZE,)))
    in_chans: int | None = both(None, 'number of image channels', range='[1, 1024]', inherited=True)
    input_size: list[int] | None = both(None, 'channels, height and width; replaces --img-size and --in-chans', nargs=3,
        range='[1, 8192]')
    use_train_size: bool = validate(False, 'use the training size of the model, not its test size')
    crop_pct: float | None = both(None, 'center crop: share of the resized image that evaluation uses',
        range='[0.1, 2]', needs=IMAGES_OF_ONE_SIZE)
    crop_mode: str | None = both(None, 'how evaluation images are cropped', choices=('squash', 'border', 'center'),
        needs=(VALIDATES, IMAGES_OF_ONE_SIZE), in_validate=dict(needs=(PILLOW, IMAGES_OF_ONE_SIZE)))
    crop_border_pixels: int | None = validate(None, 'pixels cut off each border', range='[0, 4095]', needs=PILLOW)
    tf_preprocessing: bool = validate(False, 'decode, crop and resize with TensorFlow, as models ported from it were '
        'trained')
    mean: list[float] | None = both(None, 'mean of the pixel values, in [0, 1], for all channels or for each')
    std: list[float] | None = both(None, 'standard deviation of the pixel values, for all channels or for each',
        range='(0, inf)')
    interpolation: str = both('', 'interpolation of evaluation images', choices=('', *INTERPOLATIONS))
    test_pool: bool = validate(False, 'pool over larger images at test time')
    tta: int = both(0, 'test-time augmentation, views per image: 0 or 1 off, 2 horizontal flip, 5 five crops, 10 five '
        'crops and their flips', choices=(0, 1, 2, 5, 10), needs=VALIDATES, in_validate=dict(needs=()))

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return self.in_chans if self.in_chans is not None else self.input_size[0] if self.input_size else 3



@dataclass(frozen=True)
class LoadingOptions(Group):
    """Loading."""

    batch_size: int = both(128, 'batch size per rank', names='-b --batch-size', range='[1, 1048576]',
        in_validate=dict(default=256))
    validation_batch_size: int | None = train(None, 'validation batch size per rank (default: --batch-size)',
        names='-vb --validation-batch-size', range='[1, 1048576]', needs=VALIDATES)
    workers: int = both(4, 'data loader workers per rank', names='-j --workers', range=f'[0, {4 * _CPUS + 16}]')
    persistent_workers: bool = train(True, 'keep the workers between epochs (on), or with --no-persistent-workers '
        'start them in each', needs=WORKERS)
    sampler: str = train('random', 'order of the training images: random, or balanced to draw each class equally often',
        choices=('random', 'balanced'), needs=NOT_STREAMED)
    epoch_repeats: float = train(0.0, 'passes over a streaming dataset per epoch', range='[0, inf)', needs=STREAMED)
    missing_images: str = both('error', 'images that are annotated but not on disk: end the run, or skip them',
        choices=('error', 'skip'), inherited=True)
    bad_image: str = both('skip', 'unreadable training image: train on the next one instead, or end the run',
        choices=_SKIP, needs=NOT_STREAMED,
        in_validate=dict(default='abort', help='unreadable image: leave it out, or end the run'))
    val_bad_image: str = train('abort', 'unreadable validation image: leave it out, or end the run', choices=_SKIP,
        needs=(VALIDATES, NOT_STREAMED))
    check_images: bool = train(False, 'decode the validation images before the first epoch, but for those that '
        '`check` has read', needs=(VALIDATES, NOT_STREAMED))
    decode: str = both('exact', 'fast: decode JPEG files at 1/2, 1/4 or 1/8 where crop and resize leave fewer pixels '
        'anyway; faster with photographs, pixels differ a little (docs/performance.md)', choices=('exact', 'fast'),
        needs=(FILES, IMAGES_OF_ONE_SIZE), in_validate=dict(needs=(FILES, PILLOW, IMAGES_OF_ONE_SIZE)))
    no_prefetcher: bool = both(False, 'normalize images in the data loader workers, not on the device')
    pin_mem: bool = both(False, 'pin the memory of batches', needs=ON_ACCELERATOR)
    worker_seeding: str = train('all', 'random generators that workers seed', choices=('all', 'part'), needs=WORKERS)
    use_multi_epochs_loader: bool = train(False, 'start the workers of the next epoch during validation', needs=WORKERS)



@dataclass(frozen=True)
class SizeOptions(Group):
    """Image and batch sizes that change in training."""

    train_img_sizes: list[int] | None = train(None, 'image sizes that batches are drawn from', range='[1, 8192]')
    train_batch_sizes: list[int] | None = train(None, 'batch size of each image size', range='[1, 1048576]',
        needs=_SIZES)
    train_size_probs: list[float] | None = train(None, 'probability of each image size', range='[0, inf)', needs=_SIZES)
    train_size_schedule: str = train('constant', 'constant: the same probabilities in all epochs; progressive: from '
        'the first size to the last', choices=('constant', 'progressive'), needs=_SIZES)
    train_size_schedule_spread: float = train(0.65, 'standard deviation of the progressive window, in sizes',
        range='(0, inf)', needs=(_SIZES, PROGRESSIVE))
    train_size_random_mix: float = train(0.1, 'share of uniform draws in a progressive schedule', range='[0, 1]',
        needs=(_SIZES, PROGRESSIVE))
    train_batches_per_epoch: int | None = train(None, 'batches per epoch',
        names='--train-batches-per-epoch --train-steps-per-epoch', range='[1, inf)', needs=_SIZES)
    variable_batch_loss_scale: str = train('none', 'growth of the loss with the batch size, relative to --batch-size',
        choices=('none', 'sqrt', 'linear'), needs=_SIZES)



@dataclass(frozen=True)
class NaflexOptions(Group):
    """Sequences of patches (NaFlex models)."""

    naflex_loader: bool = both(False, 'feed sequences of patches that keep the aspect ratio of each image',
        inherited=True)
    naflex_train_seq_lens: list[int] = train([128, 256, 576, 784, 1024], 'sequence lengths that training batches are '
        'drawn from; the longest has --batch-size images, shorter ones more', range='[1, 65536]', needs=_PATCHES)
    naflex_max_seq_len: int = both(576, 'sequence length of evaluation', range='[1, 65536]', needs=_PATCHES,
        inherited=True)
    naflex_patch_sizes: list[int] | None = train(None, 'patch sizes that training batches are drawn from; that of the '
        'model if not given', range='[1, 1024]', needs=_PATCHES)
    naflex_patch_size_probs: list[float] | None = train(None, 'probability of each patch size', range='[0, inf)',
        needs=(_PATCHES, _PATCH_SIZES))
    naflex_loss_scale: str = train('linear', 'growth of the loss with the batch size, relative to --batch-size',
        choices=('none', 'sqrt', 'linear'), needs=_PATCHES)
    naflex_patchify_channels_first: bool = train(False, 'flatten each patch channel by channel, for models that read '
        'patches so', needs=_PATCHES)
