"""The parsers are timm's, and no option is unknown, mistyped or ignored in silence."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from timm_mldecoder.engine.flags import parse_train, parse_validate, tell_without_effect, train_parser, validate_parser
from timm_mldecoder.engine.flags.unsupported import TRAIN_REFUSED, VALIDATE_REFUSED

# the flags of timm 1.0.29's scripts
TIMM_FLAGS = list(csv.DictReader(Path(__file__).with_name('timm_flags.csv').open()))
# what 1.0.31 added to them
ADDED = {
    'train': '--task --target-format --multilabel-threshold --loss --loss-pos-weight --loss-class-weight --poly-gamma '
    '--loss-weight-power --class-stats --poly-epsilon --resume --stop-epoch --save-epochs --lr-decay-fn '
    '--lr-stable-timescale --config',
    'validate': '--task --target-format --multilabel-threshold',
}
PARSERS = {'train': train_parser, 'validate': validate_parser}


@pytest.mark.parametrize('script', PARSERS)
def test_every_flag_of_timm_has_its_name_type_default_and_choices(script):
    ours = {action.dest: action for action in PARSERS[script]()._actions}
    for flag in (row for row in TIMM_FLAGS if row['script'] == script):
        action = ours[flag['dest']]
        assert set(flag['flags'].split()) <= {*action.option_strings, action.dest}
        assert (action.type.__name__ if action.type else '') == flag['type'], flag
        assert action.default == json.loads(flag['default']), flag
        assert str(action.nargs if action.nargs is not None else '') == flag['nargs'], flag
        assert ' '.join(action.choices or ()) == flag['choices'], flag
        assert type(action).__name__.strip('_') == flag['action'], flag


@pytest.mark.parametrize('script', PARSERS)
def test_what_timm_added_is_there(script):
    ours = {name for action in PARSERS[script]()._actions for name in action.option_strings}
    assert set(ADDED[script].split()) <= ours


@pytest.mark.parametrize(
    ('flags', 'group'),
    [
        ('--naflex-loader', 'NaFlex loaders'),
        ('--naflex-max-seq-len 128', 'NaFlex loaders'),
        ('--kd-model-name resnet18', 'Knowledge distillation'),
        ('--aug-splits 3', 'Augmentation splits'),
        ('--jsd-loss', 'Augmentation splits'),
        ('--loss jsd', 'Augmentation splits'),
        ('--split-bn', 'Split batch norm'),
        ('--torchscript', 'TorchScript'),
        ('--fuser te', 'TorchScript'),
    ],
)
def test_a_refused_flag_points_to_timm_with_the_head(flags, group):
    with pytest.raises(ValueError, match=f"{flags.split()[0]}.*{group}.*timm's own train.py .*ml_decoder=True"):
        parse_train(['DIR', *flags.split()])


def test_nothing_else_is_refused():
    refused = {names[0] for _, rows in TRAIN_REFUSED for names, _ in rows}
    assert all(
        flag.startswith(
            (
                '--naflex',
                '--kd',
                '--distill',
                '--task-loss',
                '--aug-splits',
                '--jsd',
                '--split-bn',
                '--torchscript',
                '--fuser',
            )
        )
        for flag in refused
    )
    assert {names[0] for _, rows in VALIDATE_REFUSED for names, _ in rows} <= refused | {'--tf-preprocessing'}
    with pytest.raises(ValueError, match='validate.py'):
        parse_validate(['DIR', '--torchscript'])
    with pytest.raises(ValueError, match="--tf-preprocessing.*timm's own validate.py"):
        parse_validate(['DIR', '--tf-preprocessing'])


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / 'options.yaml'
        path.write_text(text)
        return ['DIR', '--config', str(path)]

    return write


def test_config_values_are_read_as_flags_are(config):
    text = 'lr: 3e-4\nopt: lamb\nepochs: 7\namp: true\nopt_betas: [0.9, 1]\nopt_kwargs: {a: 1}\nweight_decay: 1\n'
    options = parse_train([*config(text), '--epochs', '9'])
    assert (options.lr, options.opt, options.amp, options.opt_betas) == (3e-4, 'lamb', True, [0.9, 1.0])
    assert (options.opt_kwargs, options.weight_decay) == ({'a': 1}, 1.0)
    assert options.epochs == 9, 'the command line wins'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('wieght_decay: 0.1', "'wieght_decay' is no option; did you mean 'weight_decay'"),
        ('amp: "no"', "amp: expects true or false, got 'no'"),
        ('epochs: ten', "epochs: expects int, got 'ten'"),
        ('epochs: true', 'epochs: expects int, got True'),
        ('epochs: 1.5', 'epochs: expects int, got 1.5'),
        ('lr: fast', "lr: expects float, got 'fast'"),
        ('model: 5', 'model: expects str, got 5'),
        ('opt_betas: 0.9', 'opt_betas: expects a list'),
        ('input_size: [3, 224]', 'input_size: expects 3 values, got 2'),
        ('task: segmentation', "'segmentation' is not one of classification, multilabel"),
        ('opt_kwargs: [1]', 'opt_kwargs: expects a mapping'),
        ('epochs: null', 'epochs: expects int'),
        ('- a\n- b', 'holds list, not a mapping'),
        ('a: [', 'not readable YAML'),
    ],
)
def test_config_mistakes_are_named(config, text, message):
    with pytest.raises(ValueError, match='--config .*options.yaml') as error:
        parse_train(config(text))
    assert message in str(error.value)


@pytest.mark.parametrize('flags', [['OTHER'], ['--data-dir', 'OTHER']])
def test_a_folder_of_the_command_line_wins_over_both_names_of_one_in_the_file(config, flags):
    file = config('data: OLD\ndata_dir: OLD\nepochs: 7')[1:]
    options = parse_train([*flags, *file])
    assert options.data_dir == 'OTHER'
    assert 'OLD' not in vars(options).values()
    assert parse_train(file).data_dir == 'OLD'


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(ValueError, match='none.yaml: No such file'):
        parse_train(['DIR', '--config', str(tmp_path / 'none.yaml')])


def test_every_option_survives_yaml(config):
    options = vars(parse_train(['DIR', '--opt', 'adamw', '--cutmix-minmax', '0.2', '0.8', '--model-kwargs', 'a=1']))
    saved = {name: value for name, value in options.items() if name != 'config'}
    again = vars(parse_train(config(yaml.safe_dump(saved))[1:]))
    assert {name: again[name] for name in saved} == saved


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--opt nosuch', '--opt nosuch: no such optimizer'),
        ('--model resnet51', 'did you mean resnet'),
        ('--sched cosinus', "'cosinus' is not one of 'cosine'"),
        ('--clip-mode soft', "'soft' is not one of 'norm'"),
        ('--epochs 0', '--epochs 0 is below 1'),
        ('-b 13 --mixup 0.2', 'batch size 13.*must be even'),
        ('--bce-loss --loss ce', '--bce-loss contradicts --loss ce'),
        ('--amp --model-dtype bfloat16', '--amp needs float32'),
        ('--resume auto', '--resume auto needs --experiment'),
        ('--cutmix-minmax 0.5', 'takes the smallest and the largest'),
        ('--use-ml-decoder-head 1 --model-kwargs ml_decoder=True', 'contradicts'),
        ('--data-dir OTHER', 'DIR contradicts --data-dir OTHER'),
        (f'--pretrained-path {__file__}', '--pretrained-path .* add --pretrained'),
        ('--smoothing 2', '--smoothing 2.0 is not below 1'),
        ('--opt adamw --opt-betas 0.9', r'--opt-betas \[0.9\]: --opt adamw takes 2'),
        ('--torchcompile nosuch', '--torchcompile nosuch: no such backend'),
        ('--torchcompile --torchcompile-mode nosuch', "'nosuch' is not one of 'default'"),
        ('--target-key tags', '--target-key tags: only data sets of records'),
    ],
)
def test_what_no_run_could_use_is_named(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_train(['DIR', *flags.split()])


def test_data_is_needed():
    with pytest.raises(ValueError, match='no data'):
        parse_train([])


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--aug-repeats 3', '--aug-repeats 3.0 needs more than one process'),
        ('--sync-bn', 'needs more than one process'),
        ('--bce-target-thresh 0.2', '--bce-target-thresh 0.2 needs --bce-loss'),
        ('--remode const', 'needs --reprob'),
        ('--mixup-prob 0.5', 'needs --mixup or --cutmix'),
        ('--mixup 0.1 --mixup-switch-prob 0.1', 'needs both --mixup and --cutmix'),
        ('--no-aug --hflip 0', 'which --no-aug turns off'),
        ('--model-ema-decay 0.9', 'needs --model-ema'),
        ('--num-of-groups 5', 'needs --use-ml-decoder-head 1'),
        ('--use-ml-decoder-head 1 --gp max', 'does not pool'),
        ('--lr 0.1 --lr-base 0.2', 'no --lr, which replaces it'),
        ('--opt adamw --momentum 0.8', 'an optimizer with momentum'),
        ('--decay-milestones 3 5', 'needs --sched multistep'),
        ('--drop-connect 0.1', '--drop-path'),
        ('--train-batch-sizes 8', 'needs --train-img-sizes'),
        ('--layer-decay-min-scale 0.1', 'needs --layer-decay'),
        ('--use-ml-decoder-head 1 --drop 0.5', '--ml-decoder-kwargs dropout='),
        ('--opt-eps 1e-3', 'an optimizer with an epsilon'),
        ('--opt-betas 0.5 0.6', 'an optimizer with betas'),
        ('--device cpu --synchronize-step', 'a device other than the CPU'),
        ('--sched onecycle --sched-on-updates', 'not none or onecycle'),
        ('--sched none --lr-noise 0.3', '--lr-noise [0.3] needs a schedule'),
        ('--sched none --warmup-epochs 3', '--warmup-epochs 3 needs a schedule'),
        ('--worker-seeding part -j 0', 'needs loader processes'),
    ],
)
def test_a_flag_without_effect_is_said_once(caplog, flags, message):
    parse_train(['DIR', *flags.split()])
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith('No effect')]
    assert len(said) == 1 and message in said[0]


@pytest.mark.parametrize(
    'flags',
    [
        '',
        '--bce-loss --bce-target-thresh 0.2 --smoothing 0',
        '--mixup 0.1 --cutmix 1 --mixup-switch-prob 0.2',
        '--loss bce --bce-sum',
        '--task multilabel --multilabel-threshold 0.3',
        '--model-ema --model-ema-decay 0.9',
        '--opt lamb --sched step --decay-epochs 3 --decay-rate 0.5',
        '--use-ml-decoder-head 1 --num-of-groups 5',
    ],
)
def test_flags_with_an_effect_are_taken_without_a_word(caplog, flags):
    parse_train(['DIR', *flags.split()])
    assert not [record for record in caplog.records if record.getMessage().startswith('No effect')]


def test_a_value_of_the_file_that_is_the_default_is_taken_without_a_word(caplog, config):
    parse_train(config('opt_eps: null\nsched: none\nwarmup_epochs: 5'))
    assert not caplog.records


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--use-ema', '--use-ema True needs --checkpoint'),
        ('--amp-dtype bfloat16', 'needs --amp'),
        ('--num-of-groups 5', 'needs --use-ml-decoder-head 1'),
        ('--use-ml-decoder-head 1 --gp max', 'does not pool'),
        ('--pretrained --checkpoint FILE', 'needs no --checkpoint'),
        ('--results-format json', 'needs --results-file'),
        ('--torchcompile-mode default', 'needs --torchcompile'),
        ('--target-format multihot', 'needs --task multilabel'),
        ('--num-samples 5', 'a streamed data set'),
        ('--amp --amp-dtype bfloat16', ''),
        ('--results-format json --results-file FILE', ''),
        ('--checkpoint FILE --use-ema', ''),
    ],
)
def test_validation_says_so_too(caplog, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path('FILE').touch()
    options, explicit = parse_validate(['DIR', '--device', 'cpu', *flags.split()])
    tell_without_effect(options, explicit)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith('No effect')]
    assert len(said) == bool(message) and message in ''.join(said)


def test_what_a_checkpoint_brings_along_is_nothing_the_user_gave(caplog):
    options, explicit = parse_validate(['DIR', '--device', 'cpu', '--num-of-groups', '5'])
    options.use_ml_decoder_head, options.gp = 1, 'max'
    tell_without_effect(options, explicit)
    assert not caplog.records


@pytest.mark.parametrize('flag', ['--results-file', '--class-report', '--write-class-priors'])
def test_a_file_that_cannot_be_written_is_named_before_the_evaluation(tmp_path, flag):
    for path in (tmp_path / 'missing' / 'x.csv', tmp_path):
        with pytest.raises(ValueError, match=f'{flag} {path}'):
            parse_validate(['DIR', flag, str(path)])


def test_repeated_augmentation_has_an_effect_in_two_processes(caplog, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    parse_train(['DIR', '--aug-repeats', '3'])
    assert not caplog.records


def test_defaults_that_depend_on_the_task():
    multilabel = parse_train(['DIR', '--task', 'multilabel'])
    assert (multilabel.smoothing, multilabel.eval_metric) == (0.0, 'map')
    asked = parse_train(['DIR', '--task', 'multilabel', '--smoothing', '0.1', '--eval-metric', 'micro_f1'])
    assert (asked.smoothing, asked.eval_metric) == (0.1, 'micro_f1')
    assert parse_train(['DIR', '--sched', 'wsd']).decay_epochs == 0.2
