"""Flags of the data: where it is, how it is loaded, image and batch sizes, evaluation images."""

import os

from timm_mldecoder.flags.flag import Group, Need, both, train, validate
from timm_mldecoder.flags.needs import ON_ACCELERATOR, VALIDATES, dataset, given

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
_CPUS = os.cpu_count() or 1
# fmt: off
_STREAMED_KINDS = ('hfids/', 'tfds/', 'wds/')
STREAMED = dataset(*_STREAMED_KINDS)
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
PILLOW = Need(lambda o: not o.tf_preprocessing, 'no --tf-preprocessing, which has its own crop')
NO_INPUT_SIZE = Need(lambda o: not o.input_size, 'no --input-size, which replaces it')

DATASET: Group = ('Dataset', [
    both('data', str, None, 'root folder of the dataset (or --data-dir)', nargs='?', metavar='DIR'),
    both('--data-dir', str, None, 'root folder of the dataset', metavar='DIR'),
    both('--dataset', str, '', 'dataset as KIND or KIND/NAME, such as coco2014, torch/cifar100 or wds/name; '
         'if empty, a folder or tar file with one folder per class', inherited=True),
    train('--train-split', str, 'train', 'name of the training split'),
    train('--val-split', str, 'validation', 'name of the validation split; "" trains without one'),
    validate('--split', str, 'validation', 'name of the split to evaluate'),
    train('--train-num-samples', int, None, 'number of training samples, for streaming datasets that do not report it',
          range='[1, inf)', needs=STREAMED),
    train('--val-num-samples', int, None, 'number of validation samples, for streaming datasets that do not report it',
          range='[1, inf)', needs=(STREAMED, VALIDATES)),
    validate('--num-samples', int, None, 'number of samples, for streaming datasets that do not report it',
             range='[1, inf)', needs=STREAMED),
    both('--dataset-download', bool, False, 'download missing torch/, hfids/ and tfds/ datasets',
         needs=dataset('torch/', 'hfids/', 'tfds/')),
    both('--dataset-trust-remote-code', bool, False, 'run the code that comes with a Hugging Face dataset',
         needs=dataset('hfds/', 'hfids/')),
    both('--class-map', str, '', 'file that lists the class names in the order of their indices', path='dataset file'),
    both('--voc-difficult', str, None, 'labels of Pascal-VOC that only difficult objects show; as VOC does (ignore) if '
         'not given', choices=('ignore', 'positive', 'negative'), needs=dataset('voc')),
    both('--coco-unannotated', str, 'keep', 'COCO images without annotations: keep them, as negatives of every class, '
         'or drop them, as published results do', choices=('keep', 'drop'), needs=dataset('coco'), inherited=True),
    both('--val-fraction', float, 0.0, 'share of each class to hold out of the training split, for validation',
         range='[0, 0.5]', needs=VALIDATES, inherited=True, in_validate=dict(needs=())),
    both('--split-seed', int, 0, 'seed of --val-fraction', range='[0, inf)',
         needs=given('val_fraction'), inherited=True),
    both('--split-column', str, '', 'column of a CSV file, given as DIR, that names the split of each row',
         needs=dataset('csv'), inherited=True),
    both('--path-column', str, '', 'column of a CSV file that has the paths of images (default: path)',
         needs=dataset('csv'), inherited=True),
    both('--label-column', str, '', 'column of a CSV file that has the labels (default: labels)', needs=dataset('csv'),
         inherited=True),
    both('--label-separator', str, '', 'what is between labels in a CSV file (default: ;) or a string of records '
         '(default: blanks), or list for lists such as [1, 2]', metavar='TEXT', needs=dataset('csv', 'hfds/', 'wds/'),
         inherited=True),
    train('--partial-labels', str, '', 'train on some of the labels, the others not annotated: fpc=N, N positive and N '
          'negative ones of each class, or rps=P, without a random share P of all', metavar='WAY', needs=MULTILABEL),
    both('--input-img-mode', str, None, 'PIL mode that images are converted to, such as RGB or L', inherited=True),
    both('--background', str, 'white', 'colour under transparent pixels, such as white or #808080', metavar='COLOUR',
         inherited=True),
    both('--image-range', float, None, 'values that become black and white in images of 16 bits, 32 bits or floats '
         '(default: 0 65535 for 16 bits, 0 1 for floats)', nargs=2, inherited=True),
    both('--exif-rotate', bool, False, 'turn images upright as their EXIF tag says', inherited=True),
    both('--input-key', str, None, 'key of the image in a dataset of records', metavar='KEY', inherited=True),
    both('--target-key', str, None, 'key of the target in a dataset of records', metavar='KEY', inherited=True),
    both('--task', str, 'classification', 'classification: one class per image; multilabel: any number of classes',
         choices=('classification', 'multilabel'), inherited=True),
    both('--target-format', str, 'indices', 'multi-label targets: class indices, or one value per class',
         choices=('indices', 'multihot'), needs=MULTILABEL, inherited=True),
    both('--multilabel-threshold', float, 0.5, 'probability from which a label counts as predicted (F1)',
         range='[0, 1]', needs=MULTILABEL, inherited=True),
])

CLASSES: Group = ('Text queries and zero-shot classes', [
    both('--word-embeddings', str, '', 'label embeddings, of which the queries are made '
         '(python -m timm_mldecoder.data.embed writes them)', path='file', needs=TEXT_QUERIES, inherited=True),
    both('--class-split', str, '', 'JSON file of seen and unseen classes: training uses the seen ones', path='file',
         inherited=True),
    both('--score-classes', str, 'all', 'classes of --class-split to evaluate; all scores the unseen classes alone and '
         'together with the seen ones', choices=('all', 'seen', 'unseen'), needs=given('class_split')),
    train('--random-queries', int, 0, 'number of random text queries added in training, as positives',
          range='[0, 100000]', needs=given('word_embeddings')),
    train('--query-noise', float, 0.0, 'noise on the label embeddings in training, relative to their root mean square',
          range='[0, inf)', needs=given('word_embeddings')),
    train('--query-cutout', float, 0.0, 'probability that an entry of a label embedding is zero in training',
          range='[0, 1)', needs=given('word_embeddings')),
])

IMAGES: Group = ('Images', [
    both('--img-size', int, None, 'image size in pixels; the default of the model if not given', range='[1, 8192]',
         in_validate=dict(needs=(NO_INPUT_SIZE,))),
    both('--in-chans', int, None, 'number of image channels', range='[1, 1024]', inherited=True),
    both('--input-size', int, None, 'channels, height and width; replaces --img-size and --in-chans', nargs=3,
         range='[1, 8192]'),
    validate('--use-train-size', bool, False, 'use the training size of the model, not its test size'),
    both('--crop-pct', float, None, 'center crop: share of the resized image that evaluation uses', range='[0.1, 2]',
         needs=IMAGES_OF_ONE_SIZE),
    both('--crop-mode', str, None, 'how evaluation images are cropped', choices=('squash', 'border', 'center'),
         needs=(VALIDATES, IMAGES_OF_ONE_SIZE), in_validate=dict(needs=(PILLOW, IMAGES_OF_ONE_SIZE))),
    validate('--crop-border-pixels', int, None, 'pixels cut off each border', range='[0, 4095]',
             needs=PILLOW),
    validate('--tf-preprocessing', bool, False, 'decode, crop and resize with TensorFlow, as models ported from it '
             'were trained'),
    both('--mean', float, None, 'mean of the pixel values, in [0, 1], for all channels or for each', nargs='+'),
    both('--std', float, None, 'standard deviation of the pixel values, for all channels or for each', nargs='+',
         range='(0, inf)'),
    both('--interpolation', str, '', 'interpolation of evaluation images', choices=('', *INTERPOLATIONS)),
    validate('--test-pool', bool, False, 'pool over larger images at test time'),
    both('--tta', int, 0, 'test-time augmentation, views per image: 0 or 1 off, 2 horizontal flip, 5 five crops, '
         '10 five crops and their flips', choices=(0, 1, 2, 5, 10), needs=VALIDATES, in_validate=dict(needs=())),
])

LOADING: Group = ('Loading', [
    both('-b --batch-size', int, 128, 'batch size per rank', range='[1, 1048576]',
         in_validate=dict(default=256)),
    train('-vb --validation-batch-size', int, None, 'validation batch size per rank (default: --batch-size)',
          range='[1, 1048576]', needs=VALIDATES),
    both('-j --workers', int, 4, 'data loader workers per rank', range=f'[0, {4 * _CPUS + 16}]'),
    train('--persistent-workers', bool, True, 'keep the workers between epochs (on), or with --no-persistent-workers '
          'start them in each', needs=WORKERS),
    train('--sampler', str, 'random', 'order of the training images: random, or balanced to draw each class equally '
          'often', choices=('random', 'balanced'), needs=NOT_STREAMED),
    train('--epoch-repeats', float, 0.0, 'passes over a streaming dataset per epoch', range='[0, inf)', needs=STREAMED),
    train('--missing-images', str, 'error', 'training images that are annotated but not on disk: end the run, or skip '
          'them', choices=('error', 'skip')),
    both('--bad-image', str, 'skip', 'unreadable training image: train on the next one instead, or end the run',
         choices=_SKIP, needs=NOT_STREAMED,
         in_validate=dict(default='abort', help='unreadable image: leave it out, or end the run')),
    train('--val-bad-image', str, 'abort', 'unreadable validation image: leave it out, or end the run', choices=_SKIP,
          needs=(VALIDATES, NOT_STREAMED)),
    train('--check-images', bool, False, 'decode the validation images before the first epoch, but for those that '
          '`check` has read', needs=(VALIDATES, NOT_STREAMED)),
    both('--no-prefetcher', bool, False, 'normalize images in the data loader workers, not on the device'),
    both('--pin-mem', bool, False, 'pin the memory of batches', needs=ON_ACCELERATOR),
    train('--worker-seeding', str, 'all', 'random generators that workers seed', choices=('all', 'part'),
          needs=WORKERS),
    train('--use-multi-epochs-loader', bool, False, 'start the workers of the next epoch during validation',
          needs=WORKERS),
])

SIZES: Group = ('Image and batch sizes that change in training', [
    train('--train-img-sizes', int, None, 'image sizes that batches are drawn from', nargs='+', range='[1, 8192]'),
    train('--train-batch-sizes', int, None, 'batch size of each image size', nargs='+', range='[1, 1048576]',
          needs=_SIZES),
    train('--train-size-probs', float, None, 'probability of each image size', nargs='+', range='[0, inf)',
          needs=_SIZES),
    train('--train-size-schedule', str, 'constant', 'constant: the same probabilities in all epochs; progressive: from '
          'the first size to the last', choices=('constant', 'progressive'), needs=_SIZES),
    train('--train-size-schedule-spread', float, 0.65, 'standard deviation of the progressive window, in sizes',
          range='(0, inf)', needs=(_SIZES, PROGRESSIVE)),
    train('--train-size-random-mix', float, 0.1, 'share of uniform draws in a progressive schedule', range='[0, 1]',
          needs=(_SIZES, PROGRESSIVE)),
    train('--train-batches-per-epoch --train-steps-per-epoch', int, None, 'batches per epoch', range='[1, inf)',
          needs=_SIZES),
    train('--variable-batch-loss-scale', str, 'none', 'growth of the loss with the batch size, relative to '
          '--batch-size', choices=('none', 'sqrt', 'linear'), needs=_SIZES),
])

NAFLEX: Group = ('Sequences of patches (NaFlex models)', [
    both('--naflex-loader', bool, False, 'feed sequences of patches that keep the aspect ratio of each image',
         inherited=True),
    train('--naflex-train-seq-lens', int, [128, 256, 576, 784, 1024], 'sequence lengths that training batches are '
          'drawn from; the longest has --batch-size images, shorter ones more', nargs='+', range='[1, 65536]',
          needs=_PATCHES),
    both('--naflex-max-seq-len', int, 576, 'sequence length of evaluation', range='[1, 65536]', needs=_PATCHES,
         inherited=True),
    train('--naflex-patch-sizes', int, None, 'patch sizes that training batches are drawn from; that of the model if '
          'not given', nargs='+', range='[1, 1024]', needs=_PATCHES),
    train('--naflex-patch-size-probs', float, None, 'probability of each patch size', nargs='+', range='[0, inf)',
          needs=(_PATCHES, _PATCH_SIZES)),
    train('--naflex-loss-scale', str, 'linear', 'growth of the loss with the batch size, relative to --batch-size',
          choices=('none', 'sqrt', 'linear'), needs=_PATCHES),
    train('--naflex-patchify-channels-first', bool, False, 'flatten each patch channel by channel, for models that '
          'read patches so', needs=_PATCHES),
])
