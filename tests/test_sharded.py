"""Sharded models (`--parallel fsdp`): the same training, and checkpoints that any number of ranks reads."""

import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
import safetensors.torch
import timm
import torch
from image_folders import write_images
from runs import ROOT, call, environment, pid_of_rank, start, summary, wait_for, wait_until_gone
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from timm_mldecoder.checkpoint.files import newest, shards_of
from timm_mldecoder.checkpoint.read import RUN, read_checkpoint
from timm_mldecoder.data.word_embeddings import write_word_embeddings
from timm_mldecoder.distributed import fsdp
from timm_mldecoder.distributed.read_sharded import PREFIX, SHARDS
from timm_mldecoder.distributed.world import World
from timm_mldecoder.flags import parse_train
from timm_mldecoder.flags.sharded import SHARDABLE_OPTIMIZERS
from timm_mldecoder.modeling.load import load

COMMON = '--num-classes 3 --device cpu -j 0 --no-aug --warmup-epochs 0'
# Rounding in float32 moves activations across the zero of a ReLU, and what follows amplifies that: two DDP runs of
# ResNet-50 whose weights differ by 1e-7 were 5e-4 apart after 24 steps at a rate of 1e-3, 3e-6 at 1e-4.
WITHIN = {'float64': 1e-12, 'float32': 1e-5}
# no draws, no BatchNorm: the same for any number of ranks
VIT = (
    f'{COMMON} --model test_vit --img-size 160 --opt adamw --lr 1e-4 --smoothing 0 --use-ml-decoder-head 1 '
    '--decoder-embedding 64 --num-of-groups 2 --ml-decoder-kwargs dropout=0.0'
)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """48 training images of three classes."""
    root = write_lists(tmp_path_factory.mktemp('images'), classes=3, train=16, validation=5)
    write_word_embeddings(root / 'words.safetensors', torch.eye(3, 8), [f'class_{label}' for label in range(3)])
    return root


@pytest.fixture(scope='module')
def large_data(tmp_path_factory):
    """192 training images: 24 global batches of 8."""
    return write_lists(tmp_path_factory.mktemp('large'), classes=3, train=64, validation=5)


@pytest.fixture(scope='module')
def ten_classes(tmp_path_factory):
    """50 training images of ten classes."""
    return write_lists(tmp_path_factory.mktemp('ten'), classes=10, train=5, validation=2)


def write_lists(folder, classes, train, validation):
    """Write image folders, and lists with one label or two of the same images."""
    root = write_images(folder, train, validation, classes)
    for split in ('train', 'validation'):
        lines = [
            f'{path.relative_to(root)},{label}{f";{(label + 1) % classes}" if number % 2 else ""}'
            for label in range(classes)
            for number, path in enumerate(sorted((root / split / f'class_{label}').iterdir()))
        ]
        (root / f'{split}.csv').write_text('\n'.join(['path,labels', *lines]))
    return root


def run_all(folder, commands, ranks=2, dtype='float32'):
    """Run command lines one after the other in the same ranks, and return the losses of their steps."""
    file = folder / 'commands.json'
    file.write_text(json.dumps([[str(word) for word in command] for command in commands]))
    process = call('tests/programs/runs_of_ranks.py', file, dtype, processes=ranks, timeout=1800)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads((folder / 'commands.json.losses').read_text())


def compare(data, folder, flags, *ways, ranks=2, dtype='float64'):
    """Train with ddp and in other ways, and compare the losses and the checkpoints; return the losses of ddp."""
    ways = ('--parallel ddp', *(ways or ('--parallel fsdp',)))
    commands = [
        [data, *shlex.split(flags), '--output', folder, '--experiment', str(number), *shlex.split(way)]
        for number, way in enumerate(ways)
    ]
    within = WITHIN[dtype]
    expected, *others = run_all(folder, commands, ranks, dtype)
    whole = read_checkpoint(folder / '0' / 'last.pth.tar')
    assert not shards_of(folder / '0' / 'last.pth.tar')
    for number, losses in enumerate(others, 1):
        relative = max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(losses, expected, strict=True))
        print(f'\n{ways[number]}: {len(losses)} steps, losses differ by {relative:.1e}')
        assert relative <= within, ways[number]
        path = folder / str(number) / 'last.pth.tar'
        content = read_checkpoint(path)
        assert shards_of(path)
        for key in ('state_dict', 'state_dict_ema'):
            assert content.get(key, {}).keys() == whole.get(key, {}).keys()
            for name, value in whole.get(key, {}).items():
                other = content[key][name]
                if name.endswith('in_proj_bias'):  # that of keys has no gradient but rounding, which Adam scales up
                    value, other = (torch.cat(bias.chunk(3)[::2]) for bias in (value, other))
                torch.testing.assert_close(other, value, rtol=10 * within, atol=10 * within, msg=name)
        assert content['optimizer']['state'].keys() == whole['optimizer']['state'].keys()
        for ours, theirs in zip(summary(folder / str(number)), summary(folder / '0'), strict=True):
            assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-4)
    return expected


def numbers(row):
    return {name: float(value) for name, value in row.items()}


def test_two_ranks_with_half_a_model_each_train_as_with_all_of_it(data, tmp_path):
    """And what they saved is read in one process, as by convert."""
    flags = f'{VIT} -b 4 --epochs 1 --model-ema --model-ema-decay 0.5 --clip-grad 1 --grad-accum-steps 2'
    compare(data, tmp_path, flags, dtype='float32')
    folder = tmp_path / '1'
    assert {shards_of(path) for path in folder.glob('*.pth.tar')} == set(folder.glob(f'{PREFIX}*'))

    trained = load(str(folder / 'last.pth.tar'))
    for name, value in read_checkpoint(folder / 'last.pth.tar')['state_dict_ema'].items():
        assert torch.equal(trained.model.state_dict()[name], value)
    single = tmp_path / 'single.pth.tar'
    process = subprocess.run(
        [sys.executable, '-m', 'timm_mldecoder.convert', str(folder / 'last.pth.tar'), str(single)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    shutil.move(folder, tmp_path / 'elsewhere')
    content = read_checkpoint(single)
    assert SHARDS not in content
    expected = read_checkpoint(tmp_path / 'elsewhere' / 'last.pth.tar')
    for name, value in expected['state_dict'].items():
        assert torch.equal(content['state_dict'][name], value)


def test_ranks_start_from_the_weights_that_ddp_starts_from(tmp_path):
    """Drawn, and read from files by the first rank; one has another classifier."""
    data, other = write_images(tmp_path / 'images', train=2, validation=1), timm.create_model('test_vit', num_classes=4)
    timm.models.save_for_hf(other, tmp_path / 'folder')
    safetensors.torch.save_file(other.state_dict(), tmp_path / 'weights.safetensors')
    torch.save(timm.create_model('test_vit', num_classes=3).state_dict(), tmp_path / 'weights.pth')
    head = '--use-ml-decoder-head 1 --decoder-embedding 24 --ml-decoder-kwargs learnable_queries=True dropout=0.0'
    starts = [
        '--model test_vit',
        f'--pretrained --model local-dir:{tmp_path}/folder {head}',
        f'--pretrained --model test_vit --pretrained-path {tmp_path}/weights.safetensors {head}',
        f'--model test_vit --initial-checkpoint {tmp_path}/weights.pth',
    ]
    flags = (
        f'{COMMON} --head-init-scale 0.5 --img-size 160 -b 3 --epochs 1 --lr 1e-30 --val-split "" --output {tmp_path}'
    )
    commands = [
        [data, *shlex.split(f'{flags} {start} --parallel {parallel} --experiment {parallel}{number}')]
        for number, start in enumerate(starts)
        for parallel in ('ddp', 'fsdp')
    ]
    losses = run_all(tmp_path, commands)
    assert losses[::2] == losses[1::2]
    for number in range(len(starts)):
        ddp, fsdp_ = (read_checkpoint(tmp_path / f'{name}{number}' / 'last.pth.tar') for name in ('ddp', 'fsdp'))
        for name, value in ddp['state_dict'].items():
            assert torch.equal(fsdp_['state_dict'][name], value), (starts[number], name)


@pytest.fixture
def index(tmp_path):
    """A divided checkpoint of one rank: the path of its index."""
    import torch.distributed.checkpoint as dcp

    name = f'{PREFIX}1-0-x'
    dcp.save({'state_dict.weight': torch.arange(6.0)}, checkpoint_id=tmp_path / name, no_dist=True)
    empty = torch.empty(6, device='meta')
    torch.save({SHARDS: name, 'state_dict': {'weight': empty}}, tmp_path / 'last.pth.tar')
    return tmp_path / 'last.pth.tar'


def test_an_index_brings_the_tensors_of_its_folder(index):
    assert read_checkpoint(index)['state_dict']['weight'].tolist() == list(range(6))
    assert read_checkpoint(index, whole=False)['state_dict']['weight'].is_meta


@pytest.mark.parametrize('damage', ['missing', 'short', 'metadata'])
def test_a_damaged_folder_of_tensors_is_refused(index, damage):
    folder = shards_of(index)
    (tensors,) = folder.glob('*.distcp')
    if damage == 'missing':
        shutil.rmtree(folder)
    else:
        file = tensors if damage == 'short' else folder / '.metadata'
        file.write_bytes(file.read_bytes()[:-10])
    for whole in (True, False):
        with pytest.raises(ValueError, match=PREFIX):
            read_checkpoint(index, whole)


def test_metadata_that_would_execute_code_is_refused(index, tmp_path):
    class Harmful:
        def __reduce__(self):
            return (print, ('executed',))

    (shards_of(index) / '.metadata').write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match='builtins.print'):
        read_checkpoint(index)


def test_tensors_that_would_execute_code_are_refused(index):
    """Of entries that are no tensors torch's reader unpickles what the file holds."""
    folder = shards_of(index)
    metadata = pickle.loads((folder / '.metadata').read_bytes())
    metadata.state_dict_metadata = dict.fromkeys(metadata.state_dict_metadata, BytesStorageMetadata())
    (folder / '.metadata').write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match='BytesStorageMetadata'):
        read_checkpoint(index)


@pytest.mark.parametrize(
    'flags',
    [
        '--sam 0.05', '--sync-bn', '--channels-last', '--model-ema --model-ema-force-cpu', '--opt muon',
        '--opt adafactor', '--opt kron', '--opt lookahead_adam', '--amp --amp-dtype float16',
        '--clip-grad 1 --clip-mode agc', '--dataset wds/x', '--lr-find 20',
        '--aug-splits 2 --split-bn', '--kd-model-name resnet18', f'--kd-checkpoint {__file__}', '--torchscript',
        '--naflex-loader', f'--task multilabel --word-embeddings {__file__} --graph {__file__}',
        '--val-bad-image skip',
    ],
)  # fmt: skip
def test_what_does_not_work_with_a_sharded_model_is_refused(tmp_path, flags):
    first = next(word for word in reversed(flags.split()) if word.startswith('--'))
    name = {'--amp-dtype': '--amp'}.get(first, first)
    with pytest.raises(ValueError, match=f'{name}.*--parallel fsdp'):
        parse_train([str(tmp_path), *shlex.split(flags), '--parallel', 'fsdp'])


def test_models_and_ranks_that_cannot_be_sharded_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    options, world = parse_train(['.', '--parallel', 'fsdp', '--hsdp', '3']), World(torch.device('cpu'), 0, 4)
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match='share'):
        fsdp.shard(model, [], None, options, world)
    model[1].weight = nn.Parameter(torch.tensor(0.0))
    with pytest.raises(ValueError, match='1.weight'):
        fsdp.shard(model, [], None, options, world)
    with pytest.raises(ValueError, match='--hsdp 3'):
        fsdp.create_mesh(options, world)


def test_a_skeleton_has_no_values_whatever_its_model_does():
    """A model that reads its tensors while it is created is created with them first."""

    class Reads(nn.Linear):
        def __init__(self):
            super().__init__(2, 3)
            self.total = self.weight.sum().item()

    class Keeps(nn.Linear):
        def __init__(self):
            super().__init__(2, 3)
            self.grid = torch.arange(3)

    for create in (Reads, Keeps, lambda: nn.BatchNorm1d(3)):
        model = fsdp.create_skeleton(create)
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        assert not getattr(model, 'grid', torch.empty(0)).is_meta


def test_the_removed_option_names_the_one_to_use(tmp_path):
    for arguments in (['--head-parallel'], ['--config', str(tmp_path / 'on.yaml')]):
        (tmp_path / 'on.yaml').write_text('head_parallel: true')
        with pytest.raises(ValueError, match='head.parallel was removed: .*--parallel fsdp'):
            parse_train([str(tmp_path), *arguments])
    (tmp_path / 'off.yaml').write_text('head_parallel: false')
    parse_train([str(tmp_path), '--config', str(tmp_path / 'off.yaml')])


SEVERAL = '--dataset csv --task multilabel'
LOSSES = {'bce': '--loss bce --smoothing 0.1', 'asl': f'--loss asl {SEVERAL}', 'ce': ''}
HEAD = '--use-ml-decoder-head 1 --decoder-embedding 64 --num-of-groups 2 --ml-decoder-kwargs dropout=0.0'
MODELS = {'vit': VIT, 'resnet50': f'{COMMON} --model resnet50 --img-size 64 --opt sgd --lr 1e-4 {HEAD}'}
RESNET = f'{COMMON} --model test_resnet --img-size 32 --opt sgd --lr 5e-3 -b 4 --epochs 4'
FOLLOWED = {
    'accumulation': f'{RESNET} --grad-accum-steps 2 --model-ema --recovery-interval 2',
    'text queries': f'{RESNET} --epochs 2 --model-ema --use-ml-decoder-head 1 --decoder-embedding 64 '
    '--ml-decoder-kwargs dropout=0.0 --word-embeddings WORDS',
    'unfrozen': f'{RESNET} --freeze-backbone --unfreeze-epoch 1',
    'compiled': f'{VIT} -b 4 --epochs 4 --torchcompile eager --model-ema --clip-grad 0.01 --clip-mode value',
    'cosine': f'{RESNET} --loss bce {HEAD} learnable_queries=True classifier=cosine',
    'layers': f'{RESNET} --loss asl {SEVERAL} {HEAD} num_layers=2',
    'checkpointing': f'{VIT} -b 4 --epochs 4 --drop-path 0.2 --clip-grad 1 --grad-checkpointing --opt lamb',
    'smoothed': f'{VIT} -b 4 --epochs 4 --smoothing 0.1 --grad-accum-steps 2 --model-ema --freeze-backbone '
    '--unfreeze-epoch 2',
    'aam': f'{VIT} classifier=cosine -b 4 --epochs 4 --loss aam {SEVERAL}',
    'csl': f'{VIT} -b 4 --epochs 4 --loss csl {SEVERAL} --partial-labels rps=0.5',
}


def fall(losses):
    """Return whether the losses of the last six steps are lower than those of the first."""
    return sum(losses[-6:]) < sum(losses[:6])


@pytest.mark.slow
@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('model', MODELS)
def test_four_ranks_follow_ddp(large_data, tmp_path, model, loss):
    """Over 24 steps, with one copy of the model and with two."""
    flags = f'{MODELS[model]} {LOSSES[loss]} -b 2 --epochs 1'
    ways = ('--parallel fsdp', '--parallel fsdp --hsdp 2')
    assert len(compare(large_data, tmp_path, flags, *ways, ranks=4, dtype='float32')) == 24


@pytest.mark.slow
@pytest.mark.parametrize('name', FOLLOWED)
def test_a_sharded_model_follows_ddp(data, tmp_path, name):
    assert fall(compare(data, tmp_path, FOLLOWED[name].replace('WORDS', str(data / 'words.safetensors'))))


@pytest.mark.slow
def test_mixed_precision_stays_near_ddp(data, tmp_path):
    flags = [data, *shlex.split(VIT), *shlex.split('-b 4 --epochs 2 --amp --amp-dtype bfloat16 --output'), tmp_path]
    expected, losses = run_all(tmp_path, [[*flags, '--parallel', kind] for kind in ('ddp', 'fsdp')])
    assert losses == pytest.approx(expected, rel=2e-2)  # bfloat16 has 8 bits


@pytest.mark.slow
@pytest.mark.parametrize(
    'parts',
    [
        [(2, 6, 'fsdp'), (4, 3, 'fsdp --hsdp 2'), (2, 6, 'ddp'), (1, 12, 'fsdp')],
        [(2, 6, 'ddp'), (4, 3, 'fsdp'), (2, 6, 'fsdp'), (1, 12, 'ddp')],
    ],
    ids=['first', 'second'],
)
def test_a_run_killed_on_two_ranks_four_ranks_and_one_continues_as_one_run(ten_classes, tmp_path, parts):
    """Each part is killed within an epoch. A run with ddp, stopped at the newest checkpoint, has the same losses."""
    flags = [ten_classes, *shlex.split(f'{VIT} --num-classes 10 --num-of-groups 4 --epochs 8 --clip-grad 1')]
    flags += ['--model-ema', '--resume', 'auto', '--output', tmp_path]
    for number, (ranks, size, parallel) in enumerate(parts, 1):
        part = [*flags, '-b', size, '--parallel', *parallel.split(), '--experiment', 'parts']
        if number == len(parts):
            assert call('train.py', *part, processes=ranks).returncode == 0
            reached = 8
        else:
            log = tmp_path / f'log{number}'
            launcher = start('train.py', *part, log=log, processes=ranks)
            wait_for(rf'Train: {2 * number} \[', log, launcher)
            for pid in [pid_of_rank(launcher, rank) for rank in range(ranks)]:
                with suppress(ProcessLookupError):  # torchrun was faster
                    os.kill(pid, signal.SIGKILL)
            launcher.wait(300)
            wait_until_gone(launcher.pid)
            reached = newest(tmp_path / 'parts')[1][RUN]['epoch']
        whole = [*flags, '-b', size, '--experiment', 'whole', '--stop-epoch', reached]
        process = call('train.py', *whole, processes=ranks)
        assert process.returncode == 0, process.stderr[-3000:]
    for ours, theirs in zip(summary(tmp_path / 'parts'), summary(tmp_path / 'whole'), strict=True):
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_no_rank_but_the_first_holds_the_whole_model(tmp_path):
    """Which does while it creates the model and reads weights; none while it saves or resumes."""
    flags = f'{COMMON} --img-size 32 --model-kwargs img_size=32 --opt adamw -b 1 --val-split "" --parallel fsdp'
    large = '--model vit_base_patch16_224'
    images = write_images(tmp_path / 'images', train=2, validation=1)
    weights = timm.create_model('vit_base_patch16_224', img_size=32, num_classes=3).state_dict()
    whole = sum(tensor.nbytes for tensor in weights.values()) / 2**20
    safetensors.torch.save_file(weights, tmp_path / 'weights.safetensors')
    torch.save(weights, tmp_path / 'weights.pth')

    def measure(*ways):
        commands = [
            [str(images), *shlex.split(f'{flags} {way} --output {tmp_path} --experiment {name}')]
            for name, way in ((f'first{len(ways)}', '--model test_vit'), *ways)
        ]
        (tmp_path / 'commands.json').write_text(json.dumps(commands))
        process = call('tests/programs/memory_of_ranks.py', tmp_path / 'commands.json', processes=4, timeout=1800)
        assert process.returncode == 0, process.stderr[-3000:]
        found = [json.loads(line) for line in process.stdout.splitlines()]
        for (name, _), row in zip(ways, found, strict=True):
            sizes = ', '.join(f'{part} {size:.0f}' for part, size in row.items())
            print(f'\n{name}: {sizes} MiB; model {whole:.0f} MiB')
        return found

    created = measure(
        ('drawn', large),
        ('safetensors', f'{large} --pretrained --pretrained-path {tmp_path}/weights.safetensors'),
        ('torch', f'{large} --initial-checkpoint {tmp_path}/weights.pth'),
    )
    torch.save(read_checkpoint(tmp_path / 'drawn' / 'last.pth.tar'), tmp_path / 'single.pth.tar')
    resumed = measure(
        ('divided', f'{large} --resume {tmp_path}/drawn/last.pth.tar'),
        ('single', f'{large} --resume {tmp_path}/single.pth.tar'),
    )
    # a quarter, and the unit that FSDP2 gathers
    assert all(row['begin'] < 0.6 * whole for row in created)
    # with two moments: three times the model, a quarter of it before and another while it is restored
    assert all(row['begin'] < 0.6 * 3 * whole for row in resumed)
    assert all(row['save'] < 0.6 * 3 * whole for row in created)


FAMILIES = """
    test_byobnet test_coatnet test_convnext test_efficientnet test_efficientnet_evos test_efficientnet_gn test_mambaout
    test_maxvit nf_resnet26 test_resnet test_vit test_vit3 test_vit_relpos swin_tiny_patch4_window7_224
    vit_tiny_r_s16_p8_224 hiera_tiny_224
"""


@pytest.mark.slow
def test_models_of_many_families_are_sharded():
    """With their own classifier and an ML-Decoder, scored before they are trained."""
    process = call('tests/programs/sharded_families.py', *FAMILIES.split(), processes=2, timeout=1800)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.split() == FAMILIES.split(), process.stderr[-3000:]


@pytest.mark.slow
def test_killed_while_writing_always_leaves_a_checkpoint(tmp_path):
    """Twenty kills of both ranks; after each, every checkpoint loads and no folder is left over."""
    process = subprocess.run(
        [sys.executable, str(ROOT / 'tests/programs/saving_shards.py'), '20'],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert int(process.stdout) >= 1


@pytest.mark.slow
def test_every_optimizer_that_is_allowed_steps_shards_as_whole_parameters():
    process = call('tests/programs/step_of_shards.py', *SHARDABLE_OPTIMIZERS, processes=2)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.split() == list(SHARDABLE_OPTIMIZERS)
