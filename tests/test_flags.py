"""The parsers are timm's, and no option is unknown, mistyped, out of range or without effect in silence."""

import copy
import csv
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import yaml
from timm.data import resolve_data_config
from timm.optim import optimizer_kwargs
from timm.scheduler import scheduler_kwargs

from timm_mldecoder.flags import (
    inherit,
    parse_train,
    parse_validate,
    train_options,
    train_parser,
    validate_options,
    validate_parser,
    warn_no_effect,
)
from timm_mldecoder.flags.parse import flags as flag_rows

# the flags of timm's scripts, of train.py as of September 2026 and of validate.py as of 1.0.29
TIMM_FLAGS = list(csv.DictReader(Path(__file__).with_name('timm_flags.csv').open()))
# what 1.0.31 added to them, and flags that differ here in a default or a choice
ADDED = {
    'train': '--target-format --loss --resume --stop-epoch --save-epochs --lr-decay-fn --lr-stable-timescale --config',
    'validate': '--task --target-format --multilabel-threshold',
}
PARSERS = {'train': train_parser, 'validate': validate_parser}
PARSE = {'train': parse_train, 'validate': parse_validate}
# validate.py picks raw or EMA weights itself; timm's takes the raw ones
OTHER_DEFAULT = {('validate', 'use_ema')}
# values of flags that do not take their default or 1, with what they need beside them
FILES = '--class-map --initial-checkpoint --resume --class-stats --checkpoint --real-labels --valid-labels'
VALUES = {
    **dict.fromkeys(FILES.split(), __file__),
    '--pretrained-path': f'{__file__} --pretrained',
    **dict.fromkeys(['--opt-betas', '--drop', '--drop-connect', '--drop-path', '--drop-block'], '0.5'),
    **dict.fromkeys(['--opt-kwargs', '--pretrained-cfg-overlay', '--model-kwargs'], 'a=1'),
    '--aa': 'rand-m9',
    '--aug-splits': '2',
    '--crop-mode': 'border',
    '--cutmix-minmax': '0.2 0.8',
    '--data-dir': 'DIR',
    '--fuser': 'te',
    '--input-size': '3 32 32',
    '--interpolation': 'bicubic',
    '--jsd-loss': '--aug-splits 2',
    '--kd-model-name': 'resnet18',
    '--loss-pos-weight': '2 --loss bce',
    '--lr-base-scale': 'sqrt',
    '--model-dtype': 'bfloat16',
    '--naflex-loader': '--model naflexvit_base_patch16_gap',
    '--opt-betas': '0.5 0.6 --opt adamw',
    '--split-bn': '--resplit',
    '--input-key': 'image --dataset hfds/x',
    '--target-key': 'label --dataset hfds/x',
    '--torchcompile': 'inductor',
    '--torchcompile-mode': 'default',
    '--train-crop-mode': 'rrc',
    '--wandb-resume-id': f'1 --resume {__file__}',
}


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / 'options.yaml'
        path.write_text(text)
        return ['DIR', '--config', str(path)]

    return write


@pytest.fixture
def no_effect(caplog):
    """The warnings of flags without effect."""
    return lambda: [record.getMessage() for record in caplog.records if record.getMessage().startswith('No effect')]


class TestTimm:
    @pytest.mark.parametrize('script', PARSERS)
    def test_every_flag_has_timms_names_type_default_and_choices(self, script):
        ours = {action.dest: action for action in PARSERS[script]()._actions}
        for flag in (row for row in TIMM_FLAGS if row['script'] == script):
            action = ours[flag['dest']]
            assert set(flag['flags'].split()) <= {*action.option_strings, action.dest}, flag
            if (script, flag['dest']) not in OTHER_DEFAULT:
                assert action.default == json.loads(flag['default']), flag
            assert str(action.nargs if action.nargs is not None else '') == flag['nargs'], flag
            if flag['action'] == 'StoreAction':
                assert action.type.__name__ == (flag['type'] or 'str'), flag
            if flag['choices']:
                assert ' '.join(action.choices) == flag['choices'], flag

    @pytest.mark.parametrize('script', PARSERS)
    def test_what_timm_added_is_there(self, script):
        ours = {name for action in PARSERS[script]()._actions for name in action.option_strings}
        assert set(ADDED[script].split()) <= ours

    @pytest.mark.parametrize('script', PARSERS)
    def test_no_flag_is_refused_but_torchscript_with_a_head(self, script, monkeypatch):
        monkeypatch.setattr('importlib.util.find_spec', lambda name: True)  # as if every optional package were there
        for flag in (row for row in TIMM_FLAGS if row['script'] == script and row['flags'].startswith('-')):
            name, default = flag['flags'].split()[-1], json.loads(flag['default'])
            values = VALUES.get(name) or (flag['choices'].split() or [str(default or 1)])[-1]
            if flag['action'] == 'StoreTrueAction' and name not in VALUES:
                values = ''
            elif isinstance(default, list) and name not in VALUES:
                values = ' '.join(map(str, default or [1]))
            PARSE[script](['DIR', name, *values.split()])
        with pytest.raises(ValueError, match='--torchscript .*--torchcompile'):
            PARSE[script](['DIR', '--torchscript', '--use-ml-decoder-head', '1'])

    def test_timms_helpers_take_the_options(self):
        options = parse_train(['DIR', '--opt', 'adamw', '--opt-betas', '0.9', '0.99', '--img-size', '64', '--lr', '1'])
        assert optimizer_kwargs(cfg=options.to_namespace())['betas'] == [0.9, 0.99]
        assert scheduler_kwargs(options.to_namespace())['num_epochs'] == 300
        assert resolve_data_config(options.to_dict())['input_size'] == (3, 64, 64)


@pytest.mark.parametrize('script', PARSERS)
def test_help_renders_in_groups_with_every_flag(script):
    shown = PARSERS[script]().format_help()
    for row in flag_rows(script).values():
        assert any(re.search(rf'{re.escape(name)}\b', shown) for name in row.names), row.label
        assert row.help and not row.help.endswith('.')
    assert shown.count('\n') < 620


@pytest.mark.parametrize('script', PARSERS)
def test_the_short_help_has_what_most_runs_need_and_names_the_long_one(script, capsys):
    parser, needed = PARSERS[script](), {'train': '--epochs --lr --opt --resume', 'validate': '--checkpoint --report'}
    with pytest.raises(SystemExit):
        parser.parse_args(['--help'])
    shown = capsys.readouterr().out
    flags = set(re.findall(r'--[a-z][\w-]+', shown))
    assert flags >= {'--help-all', '--model', '--use-ml-decoder-head', *needed[script].split()}
    assert '--naflex-loader' not in shown and shown.count('\n') < 150
    with pytest.raises(SystemExit):
        PARSERS[script]().parse_args(['--help-all'])
    assert '--naflex-loader' in capsys.readouterr().out


class TestSwitches:
    def test_a_switch_can_be_turned_off(self, config):
        assert parse_train(['DIR', '--amp']).amp is True
        assert parse_train([*config('amp: true\nmodel_ema: true'), '--no-amp']).amp is False
        assert parse_train([*config('amp: false'), '--amp']).amp is True

    @pytest.mark.parametrize('script', PARSERS)
    def test_every_switch_has_both_forms_except_names_that_begin_with_no(self, script):
        names = {name for action in PARSERS[script]()._actions for name in action.option_strings}
        for row in flag_rows(script).values():
            if row.type is bool:
                assert (f'--no-{row.label[2:]}' in names) is not row.label.startswith('--no-')

    def test_validation_chooses_the_weights_unless_told(self):
        assert parse_validate(['DIR']).use_ema is None
        assert parse_validate(['DIR', '--checkpoint', __file__, '--no-use-ema']).use_ema is False


class TestOptions:
    def test_nothing_writes_to_them(self):
        options = parse_train(['DIR'])
        with pytest.raises(AttributeError, match='epochs'):
            options.epochs = 3
        with pytest.raises(AttributeError, match='epochs'):
            del options.epochs
        with pytest.raises(AttributeError, match='nothing'):
            _ = options.nothing
        options.to_dict()['scale'].append(1)
        assert options.scale == [0.08, 1.0]

    def test_replace_makes_another(self):
        options = parse_train(['DIR', '--epochs', '3'])
        changed = options.replace(epochs=4)
        assert (options.epochs, changed.epochs, changed.given) == (3, 4, options.given)
        assert changed != options and changed.replace(epochs=3) == options
        with pytest.raises(ValueError, match='epocs.*epochs'):
            options.replace(epocs=3)

    def test_they_are_copied_pickled_and_shown(self):
        options = parse_train(['DIR', '--opt', 'lamb'])
        for again in (pickle.loads(pickle.dumps(options)), copy.copy(options), copy.deepcopy(options)):
            assert again == options and again.given == options.given
        assert "opt='lamb'" in repr(options)
        assert vars(options.to_namespace()) == options.to_dict()

    def test_they_know_what_the_user_gave(self, config):
        options = parse_train([*config('lr: 0.1\nopt_eps: null\namp: false'), '--epochs', '300', '-b', '8'])
        assert options.given == {'data', 'config', 'lr', 'amp', 'epochs', 'batch_size'}

    def test_values_make_the_same_options_as_a_command_line(self):
        assert train_options(data='DIR', epochs=3, amp=True, scale=(0.5, 1)) == parse_train(
            ['DIR', '--epochs', '3', '--amp', '--scale', '0.5', '1']
        )
        assert validate_options(data_dir='DIR', batch_size=8) == parse_validate(['DIR', '-b', '8'])
        assert train_options(data=Path('DIR'), no_aug=False, model_kwargs={'act_layer': Path}).model_kwargs == {
            'act_layer': Path
        }

    @pytest.mark.parametrize(
        ('values', 'named'),
        [
            (dict(epocs=3), 'epocs.*epochs'),
            (dict(epochs='x'), '--epochs'),
            (dict(epochs=0), '--epochs'),
            (dict(amp=1), '--amp'),
            (dict(scale=0.5), '--scale'),
            (dict(sched='cosinus'), '--sched'),
            (dict(input_size=[3, 224]), '--input-size'),
            (dict(model_kwargs=[1]), '--model-kwargs'),
        ],
    )
    def test_values_are_checked(self, values, named):
        with pytest.raises(ValueError, match=named):
            train_options(data='DIR', **values)


class TestConfig:
    def test_values_are_read_as_flags_are(self, config):
        text = 'lr: 3e-4\nopt: lamb\nepochs: 7\namp: true\nopt_betas: [0.9, 0.5]\nweight_decay: 1\n'
        text += 'opt_kwargs: {a: 1, eps: 3e-4, b: [1, {c: x}], d: "1"}\nhead_init_bias: -1e-3\ntorchcompile: true\n'
        options = parse_train([*config(text + 'val_split: ""'), '--epochs', '9'])
        assert (options.lr, options.opt, options.amp, options.opt_betas) == (3e-4, 'lamb', True, [0.9, 0.5])
        assert options.opt_kwargs == {'a': 1, 'eps': 3e-4, 'b': [1, {'c': 'x'}], 'd': '1'}
        assert (options.weight_decay, options.head_init_bias) == (1.0, -1e-3)
        assert (options.torchcompile, options.val_split) == ('inductor', '')
        assert options.epochs == 9, 'the command line wins'

    def test_a_list_does_not_take_in_the_folder_of_the_command_line(self, config):
        file = config('scale: [0.5, 1.0]\nopt_kwargs: {a: 1}')[1:]
        options = parse_train([*file, 'DIR'])
        assert (options.data_dir, options.scale) == ('DIR', [0.5, 1.0])

    @pytest.mark.parametrize(
        ('text', 'key'),
        [
            ('wieght_decay: 0.1', "'wieght_decay'.*weight_decay"),
            ('amp: "no"', "amp: .*'no'"),
            ('amp: 1', 'amp: .*1'),
            ('epochs: ten', 'epochs: .*ten'),
            ('epochs: null', 'epochs: .*None'),
            ('epochs: [1]', r'epochs: .*\[1\]'),
            ('epochs: 0', 'epochs 0'),
            ('opt_betas: 0.9', 'opt_betas: .*0.9'),
            ('input_size: [3, 224]', 'input_size: .*3'),
            ('task: segmentation', 'task: .*segmentation.*multilabel'),
            ('opt_kwargs: [1]', 'opt_kwargs: .*mapping'),
            ('opt_kwargs: {a: .inf}', 'opt_kwargs: .*inf'),
            ('epochs: 1\nepochs: 2', 'epochs'),
            ('config: other.yaml', 'config'),
            ('- a\n- b', 'list'),
            ('', 'NoneType'),
            ('a: [', 'YAML'),
            ('a: !!python/object/apply:os.system [ls]', 'YAML'),
            ('a: ' + '[' * 5000, 'levels'),
            ('a: &a [x,x,x,x,x,x,x,x,x,x]\n' + ''.join(f'{new}: &{new} [{",".join([f"*{old}"] * 10)}]\n'
             for old, new in zip('abcdef', 'bcdefg', strict=True)), 'aliases'),
            ('a: &a [*a]', 'aliases'),
        ],
        ids=lambda text: text[:20],
    )  # fmt: skip
    def test_mistakes_are_named_in_one_line(self, config, text, key):
        with pytest.raises(ValueError, match=f'(?s)--config .*options.yaml.*{key}') as error:
            parse_train(config(text))
        assert '\n' not in str(error.value) and len(str(error.value)) < 1000

    def test_aliases_that_stay_small_are_read(self, config):
        assert parse_train(config('mean: &x [0.5]\nstd: *x')).std == [0.5]

    @pytest.mark.parametrize('flags', [['OTHER'], ['--data-dir', 'OTHER']])
    def test_a_folder_of_the_command_line_wins_over_both_names_of_one_in_the_file(self, config, flags):
        file = config('data: OLD\ndata_dir: OLD\nepochs: 7')[1:]
        options = parse_train([*flags, *file])
        assert options.data_dir == 'OTHER'
        assert 'OLD' not in options.to_dict().values()
        assert parse_train(file).data_dir == 'OLD'

    @pytest.mark.parametrize('path', ['none.yaml', '.', '/dev/zero'])
    def test_what_is_not_a_file_is_named(self, tmp_path, path):
        with pytest.raises(ValueError, match='--config '):
            parse_train(['DIR', '--config', str(tmp_path / path)])

    def test_every_option_survives_yaml(self, config):
        flags = '--opt adamw --cutmix-minmax 0.2 0.8 --model-kwargs a=1 b=[1,2] c=x --experiment 007 --early-stop --amp'
        options = parse_train(['DIR', *flags.split(), '--wandb-tags', 'a b', '3e-4', '--dist-bn='])
        again = parse_train(config(yaml.safe_dump({**options.to_dict(), 'config': None}))[1:])
        assert again.replace(config='') == options


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--opt nosuch', '--opt nosuch'),
        ('--model resnet51', '--model resnet51.*did you mean resnet'),
        ('--sched cosinus', '--sched.*cosinus.*cosine'),
        ('--wieght-decay 1', '--wieght-decay.*--weight-decay'),
        ('-b 13 --mixup 0.2', '--batch-size 13.*even'),
        ('--bce-loss --loss ce', '--bce-loss contradicts --loss ce'),
        ('--amp --model-dtype bfloat16', '--amp needs float32'),
        ('--resume auto', '--resume auto needs --experiment'),
        ('--resume none.pth', '--resume none.pth'),
        ('--cutmix-minmax 0.5', '--cutmix-minmax 0.5'),
        ('--scale 1 0.5', '--scale 1.0 0.5'),
        ('--use-ml-decoder-head 1 --model-kwargs ml_decoder=True', 'contradicts'),
        ('--data-dir OTHER', 'DIR contradicts --data-dir OTHER'),
        (f'--pretrained-path {__file__}', '--pretrained-path .* add --pretrained'),
        ('--smoothing 2', '--smoothing 2.0'),
        ('--opt adamw --opt-betas 0.9', r'--opt-betas 0.9: --opt adamw takes 2'),
        ('--torchcompile nosuch', '--torchcompile nosuch'),
        ('--torchcompile --torchcompile-mode nosuch', '--torchcompile-mode.*nosuch.*default'),
        ('--target-key tags', '--target-key tags'),
        ('--decay-epochs 0 --sched step', '--decay-epochs 0'),
        ('--sched onecycle --warmup-epochs 0', '--sched onecycle.*--warmup-epochs'),
        ('--sched onecycle --opt adagrad', '--sched onecycle.*adagrad'),
        ('--sched plateau --sched-on-updates', '--sched plateau'),
        ('--eval-metric map', '--eval-metric map.*top1'),
        ('--task multilabel --eval-metric top1', '--eval-metric top1.*micro_f1'),
        (f'--task multilabel --class-split {__file__} --eval-metric map', '--eval-metric map.*gzsl_map'),
        ('--loss csl', '--loss csl needs --task multilabel'),
        ('--task multilabel --loss ce', '--loss ce needs --task classification'),
        ('--model-kwargs num_classes=7', '--model-kwargs num_classes=7.*--num-classes'),
        ('--model-kwargs drop_rate=0.1', '--model-kwargs drop_rate=0.1.*--drop'),
        ('--ml-decoder-kwargs num_heads=1.5', '--ml-decoder-kwargs num_heads=1.5.*int'),
        ('--ml-decoder-kwargs learnable_queries=1', '--ml-decoder-kwargs learnable_queries=1.*bool'),
        ('--ml-decoder-kwargs word_embeddings=5', '--ml-decoder-kwargs word_embeddings=5.*--word-embeddings'),
        ('--ml-decoder-kwargs layers=5', '--ml-decoder-kwargs layers=5.*num_layers'),
        ('--num-of-groups 0', '--num-of-groups 0'),
        ('--aa foo', '--aa foo'),
        ('--aa rand-foo5', '--aa rand-foo5'),
        (f'--class-split {__file__}', '--class-split .*--task multilabel'),
        ('--img-size 100000', '--img-size 100000.*8192'),
        ('--loss-class-weight inv', '--loss-class-weight inv.*inv_freq.*effective_num'),
        ('--loss bce --loss-pos-weight inv_freq', '--loss-pos-weight inv_freq.*neg_pos'),
        ('--loss poly --loss-class-weight 2', '--loss-class-weight 2.*ce'),
        ('--graph none.pt', '--graph none.pt'),
        (f'--graph {__file__}', '--graph .*--word-embeddings'),
        ('--sampler balanced --aug-repeats 3', '--sampler balanced.*--aug-repeats'),
        ('--train-img-sizes 32 64 --train-batch-sizes 4', '--train-batch-sizes 4'),
        ('--device zzz', '--device .*zzz'),
        ('--mean 0.5 0.5', '--mean 0.5 0.5'),
    ],
)
def test_what_no_run_could_use_is_named(flags, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_train(['DIR', *flags.split()])
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--class-report report.csv', '--class-report'),
        ('--write-thresholds', '--write-thresholds.*--checkpoint'),
        ('--task multilabel --metrics-avg macro', '--metrics-avg'),
        (f'--task multilabel --real-labels {__file__}', '--real-labels'),
        (f'--real-labels {__file__} --bad-image skip', '--bad-image abort'),
        ('--img-size 64 --crop-border-pixels 100', '--crop-border-pixels 100'),
    ],
)
def test_what_no_evaluation_could_use_is_named(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_validate(['DIR', *flags.split()])


@pytest.mark.parametrize('script', PARSERS)
def test_every_flag_answers_odd_values_with_its_name(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = 0
    for row in flag_rows(script).values():
        odd = {int: ('x', '', '1.5', '9' * 30), float: ('x', '', 'nan', 'inf', '-inf')}.get(row.type, ())
        if row.path:
            odd = ('missing/file',) + (() if 'folder' in row.path else ('.',)) + ('/dev/null',)
        if row.type is dict:
            odd = ('x', 'a=1e999', 'a={[]:1}')
        for value in odd:
            arguments = [f'{row.label}={value}'] if row.nargs != 3 else [row.label, value, value, value]
            with pytest.raises(ValueError, match=f'{row.label}|{row.names[-1]}'):
                PARSE[script](['DIR', *arguments])
            refused += 1
    assert refused > 100 and not os.listdir()


def test_data_is_needed():
    with pytest.raises(ValueError, match='--data-dir'):
        parse_train([])
    parse_train(['--dataset', 'hfds/name'])


def test_a_class_map_may_lie_in_the_folder_of_the_dataset(tmp_path):
    (tmp_path / 'names.txt').touch()
    assert parse_train([str(tmp_path), '--class-map', 'names.txt']).class_map == 'names.txt'


@pytest.mark.parametrize(
    ('flags', 'named', 'needed'),
    [
        ('--aug-repeats 3', '--aug-repeats 3.0', 'more than one rank'),
        ('--sync-bn', '--sync-bn', 'more than one rank'),
        ('--bce-target-thresh 0.2', '--bce-target-thresh 0.2', '--loss bce'),
        ('--remode const', '--remode const', '--reprob'),
        ('--mixup-prob 0.5', '--mixup-prob', '--mixup or --cutmix'),
        ('--mixup 0.1 --mixup-switch-prob 0.1', '--mixup-switch-prob', 'both --mixup and --cutmix'),
        ('--no-aug --hflip 0', '--hflip', '--no-aug'),
        ('--aa rand-m5 --color-jitter-prob 0.1', '--color-jitter-prob', '--aa'),
        ('--model-ema-decay 0.9', '--model-ema-decay', '--model-ema'),
        ('--num-of-groups 5', '--num-of-groups', '--use-ml-decoder-head 1'),
        ('--use-ml-decoder-head 1 --gp max', '--gp', 'does not pool'),
        ('--lr 0.1 --lr-base 0.2', '--lr-base', '--lr'),
        ('--opt adamw --momentum 0.8', '--momentum', 'momentum'),
        ('--decay-milestones 3 5', '--decay-milestones 3 5', '--sched multistep'),
        ('--drop-connect 0.1', '--drop-connect', '--drop-path'),
        ('--train-batch-sizes 8', '--train-batch-sizes 8', '--train-img-sizes'),
        ('--train-steps-per-epoch 8', '--train-steps-per-epoch 8', '--train-img-sizes'),
        ('--dr 0.3', '--dr 0.3', '--sched'),
        ('--layer-decay-min-scale 0.1', '--layer-decay-min-scale', '--layer-decay'),
        ('--use-ml-decoder-head 1 --drop 0.5', '--drop', '--ml-decoder-kwargs dropout='),
        ('--opt-eps 1e-3', '--opt-eps', 'epsilon'),
        ('--opt-betas 0.5 0.6', '--opt-betas 0.5 0.6', 'betas'),
        ('--device cpu --synchronize-step', '--synchronize-step', 'a device other than the CPU'),
        ('--sched onecycle --sched-on-updates', '--sched-on-updates', '--sched'),
        ('--sched none --lr-noise 0.3', '--lr-noise 0.3', '--sched'),
        ('--sched none --warmup-epochs 3', '--warmup-epochs', '--sched'),
        ('--worker-seeding part -j 0', '--worker-seeding', '--workers'),
        ('--unfreeze-epoch 3', '--unfreeze-epoch', '--freeze-backbone'),
        ('--graph-layer gat', '--graph-layer', '--graph'),
        ('--task multilabel --crop-mode squash --val-split=', '--crop-mode', '--val-split'),
    ],
)
def test_a_flag_without_effect_is_warned_about_once(no_effect, flags, named, needed):
    parse_train(['DIR', *flags.split()])
    (message,) = no_effect()
    assert f'{named} ' in message.partition('needs')[0] and needed in message.partition('needs')[2]


@pytest.mark.parametrize(
    'flags',
    [
        '',
        '--bce-loss --bce-target-thresh 0.2 --smoothing 0',
        '--mixup 0.1 --cutmix 1 --mixup-switch-prob 0.2',
        '--loss bce --bce-sum',
        '--loss-class-weight 1,2,3',
        '--task multilabel --multilabel-threshold 0.3',
        '--model-ema --model-ema-decay 0.9',
        '--opt lamb --sched step --decay-epochs 3 --decay-rate 0.5',
        '--use-ml-decoder-head 1 --num-of-groups 5 --ml-decoder-kwargs num_layers=2 dropout=0 classifier=cosine',
        '--freeze-backbone --unfreeze-epoch 3 --head-lr-scale 3 --early-stop 4 --fresh-head',
        '--sampler balanced --missing-images skip --tta 10',
    ],
)
def test_flags_with_an_effect_are_not_warned_about(no_effect, flags):
    parse_train(['DIR', *flags.split()])
    assert not no_effect()


def test_a_value_of_the_file_that_is_the_default_is_not_warned_about(no_effect, config):
    parse_train(config('opt_eps: null\nsched: none\nwarmup_epochs: 5'))
    assert not no_effect()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--use-ema', '--use-ema needs --checkpoint'),
        ('--amp-dtype bfloat16', 'needs --amp'),
        ('--num-of-groups 5', 'needs --use-ml-decoder-head 1'),
        ('--use-ml-decoder-head 1 --gp max', 'does not pool'),
        ('--pretrained --checkpoint FILE', 'needs no --checkpoint'),
        ('--results-format json', 'needs --results-file'),
        ('--torchcompile-mode default', 'needs --torchcompile'),
        ('--target-format multihot', 'needs --task multilabel'),
        ('--num-samples 5', '--dataset'),
        ('--img-size 32 --input-size 3 64 64', '--input-size'),
        ('--amp --amp-dtype bfloat16', ''),
        ('--results-format json --results-file FILE', ''),
        ('--checkpoint FILE --use-ema', ''),
        ('--tta 5 --crop-mode center', ''),
    ],
)
def test_validation_warns_too(no_effect, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path('FILE').touch()
    warn_no_effect(parse_validate(['DIR', '--device', 'cpu', *flags.split()]), 'validate')
    assert len(no_effect()) == bool(message) and message in ''.join(no_effect())


class TestInheritance:
    def test_a_checkpoint_brings_how_the_model_was_trained(self, caplog, no_effect):
        flags = '--use-ml-decoder-head 1 --num-of-groups 7 --gp max --epochs 5 --model resnet18 --amp -b 8'
        trained = parse_train(['DIR', *flags.split()]).to_dict()
        options = inherit(parse_validate(['OTHER', '--num-of-groups', '5', '--checkpoint', __file__]), trained)
        assert (options.use_ml_decoder_head, options.num_of_groups, options.model) == (1, 5, 'resnet18')
        assert (options.amp, options.batch_size, options.data_dir) == (True, 256, 'OTHER')
        caplog.clear()
        warn_no_effect(options, 'validate')
        assert not no_effect(), 'the user did not give --gp'

    def test_the_precision_of_the_user_replaces_that_of_the_training(self):
        trained = parse_train(['DIR', '--amp', '--amp-dtype', 'bfloat16']).to_dict()
        options = inherit(parse_validate(['DIR', '--model-dtype', 'bfloat16', '--checkpoint', __file__]), trained)
        assert (options.amp, options.model_dtype) == (False, 'bfloat16')

    @pytest.mark.parametrize(('device', 'dtype'), [('cuda', 'bfloat16'), ('cpu', 'float16')])
    def test_float16_of_a_gpu_is_bfloat16_on_a_cpu(self, device, dtype):
        trained = parse_train(['DIR', '--amp', '--amp-dtype', 'float16', '--device', device]).to_dict()
        options = inherit(parse_validate(['DIR', '--device', 'cpu', '--checkpoint', __file__]), trained)
        assert (options.amp, options.amp_dtype) == (True, dtype)

    def test_flags_are_checked_against_the_task_of_the_checkpoint(self, tmp_path):
        flags = ['DIR', '--checkpoint', __file__, '--class-report', str(tmp_path / 'report.csv')]
        with pytest.raises(ValueError, match='--class-report'):
            inherit(parse_validate(flags), {'task': 'classification'})
        assert inherit(parse_validate(flags), {'task': 'multilabel'}).task == 'multilabel'


@pytest.mark.parametrize('flag', ['--results-file', '--class-report', '--write-class-priors'])
def test_a_file_that_cannot_be_written_is_named_before_the_evaluation(tmp_path, flag):
    for path in (tmp_path / 'missing' / 'x.csv', tmp_path):
        with pytest.raises(ValueError, match=f'{flag} {path}'):
            parse_validate(['DIR', flag, str(path)])


def test_repeated_augmentation_has_an_effect_in_two_processes(no_effect, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    parse_train(['DIR', '--aug-repeats', '3'])
    assert not no_effect()


def test_defaults_that_depend_on_other_options():
    multilabel = parse_train(['DIR', '--task', 'multilabel'])
    assert (multilabel.smoothing, multilabel.eval_metric) == (0.0, 'map')
    given = parse_train(['DIR', '--task', 'multilabel', '--smoothing', '0.1', '--eval-metric', 'micro_f1'])
    assert (given.smoothing, given.eval_metric) == (0.1, 'micro_f1')
    zero_shot = ['DIR', '--task', 'multilabel', '--class-split', __file__]
    assert parse_train(zero_shot).eval_metric == 'zsl_map'
    assert parse_train([*zero_shot, '--score-classes', 'seen']).eval_metric == 'map'
    assert parse_train(['DIR', '--sched', 'wsd']).decay_epochs == 0.2
    assert parse_train(['DIR', '--amp', '--device', 'cpu']).amp_dtype == 'bfloat16'
    assert parse_train(['DIR', '--amp', '--device', 'cpu', '--amp-dtype', 'float16']).amp_dtype == 'float16'
    assert parse_train(['DIR', '--amp', '--device', 'cuda']).amp_dtype == 'float16'
    assert parse_train(['DIR', '--grad-accum-steps', '0']).grad_accum_steps == 1
    assert parse_train(['DIR', '--early-stop']).early_stop == 10


def test_the_scripts_differ_where_timms_do():
    train, validate = parse_train(['DIR']), parse_validate(['DIR'])
    assert (train.batch_size, validate.batch_size) == (128, 256)
    assert (train.model, validate.model) == ('resnet50', 'dpn92')
    assert (train.bad_image, validate.bad_image) == ('skip', 'abort')


def test_a_recipe_is_found_by_its_name():
    options = parse_train(['.', '--config', 'imagenet/resnet50_mldecoder_a3', '--device', 'cpu'])
    assert options.config.endswith('hparams/imagenet/resnet50_mldecoder_a3.yaml')
    assert options.opt == 'lamb'


@pytest.mark.parametrize(
    ('flags', 'named'),
    [
        ('--pretrained', 'finetune/single_label'),
        ('--pretrained --task multilabel --num-classes 3', 'finetune/multilabel'),
        ('--pretrained --opt adamw', ''),
        ('--pretrained --config finetune/single_label', ''),
        ('', ''),  # from random weights, timm's defaults are what is expected
    ],
)
def test_fine_tuning_without_a_recipe_names_one(flags, named, caplog):
    parse_train(['data', '--device', 'cpu', *flags.split()])
    found = [record.getMessage() for record in caplog.records if 'finetune/' in record.getMessage()]
    assert len(found) == bool(named) and all(named in message for message in found)


@pytest.mark.parametrize(
    'flags', ['--ml-decoder', '--ml-decoder 1', '--use-ml-decoder 1', '--weight 0.1', '--drop-p 0.1']
)
def test_flags_have_no_abbreviations(flags):
    with pytest.raises(ValueError, match='unknown argument'):
        parse_train(['data', '--device', 'cpu', *flags.split()])


@pytest.mark.parametrize('name', ['--ml-decoder-kwargs', '--model-kwargs', '--opt-kwargs', '--loss-kwargs'])
def test_a_flag_of_pairs_without_a_pair_is_refused_and_an_empty_text_clears(name, tmp_path):
    with pytest.raises(ValueError, match='KEY=VALUE'):
        parse_train(['data', '--device', 'cpu', name])
    (tmp_path / 'c.yaml').write_text(f'{name[2:].replace("-", "_")}: {{a: 1}}')
    options = parse_train(['data', '--device', 'cpu', '--config', str(tmp_path / 'c.yaml'), name, ''])
    assert options[name[2:].replace('-', '_')] == {}


@pytest.mark.parametrize('parse', [parse_train, parse_validate])
def test_the_name_of_the_option_of_create_model_is_answered_with_the_flag(parse):
    with pytest.raises(ValueError, match='--ml-decoder, did you mean --use-ml-decoder-head 1'):
        parse(['data', '--device', 'cpu', '--ml-decoder'])


def test_the_options_of_a_run_have_the_rate_that_was_computed(tmp_path, no_effect):
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'args.yaml').write_text('data_dir: d\nlr: 0.00025\nlr_base: 0.0028\nlr_base_size: 128\nsched: cosine\n')
    for flags in (
        ['--config', folder / 'args.yaml'],
        ['--resume', 'auto', '--output', tmp_path, '--experiment', 'run'],
    ):
        assert parse_train([*map(str, flags)]).lr == 0.00025
    assert not no_effect()
    with pytest.raises(ValueError, match='no dataset.*--experiment typo has no run'):
        parse_train(['--resume', 'auto', '--output', str(tmp_path), '--experiment', 'typo'])
