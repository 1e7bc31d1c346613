"""Flags of the loss, the optimizer and the learning rate."""

from timm.loss import LOSS_TYPES

from timm_mldecoder.flags.flag import Group, Need, train
from timm_mldecoder.flags.needs import given, loss, loss_name, optimizer_info, sched
from timm_mldecoder.losses import LOSSES

LOSS_NAMES = tuple(dict.fromkeys((*LOSS_TYPES, *LOSSES)))
_LAYER_DECAY, _NOISE, _WARMUP = given('layer_decay'), given('lr_noise'), given('warmup_epochs')

# fmt: off
SCHEDULED = Need(lambda o: o.sched != 'none', 'a schedule: --sched other than none')
CYCLES = sched('cosine', 'tanh', 'poly')
EPOCH_SCHEDULE = Need(lambda o: o.sched not in ('none', 'onecycle'), '--sched other than none and onecycle')
NO_LR = Need(lambda o: not o.lr, 'no --lr, which replaces it')
MOMENTUM = Need(lambda o: optimizer_info(o).has_momentum, 'an optimizer with momentum')
EPSILON = Need(lambda o: optimizer_info(o).has_eps, 'an optimizer with an epsilon')
BETAS = Need(lambda o: optimizer_info(o).has_betas, 'an optimizer with betas')
CLASS_STATS = Need(lambda o: loss_name(o) == 'db' or bool(o.loss_pos_weight or o.loss_class_weight),
                   '--loss db, or a method in --loss-pos-weight or --loss-class-weight')

LOSS: Group = ('Loss', [
    train('--loss', str, None, f'loss, one of {", ".join(LOSS_NAMES)}, or a class of your own, package.module:Class, '
          'with --loss-kwargs; if not given, ce for one class per image and bce for several. csl, aam, hill and splc '
          'need --task multilabel', metavar='NAME'),
    train('--bce-loss', bool, False, 'binary cross-entropy, the same as --loss bce'),
    train('--jsd-loss', bool, False, 'cross-entropy of the first view and Jensen-Shannon divergence of the views of '
          '--aug-splits, the same as --loss jsd'),
    train('--bce-sum', bool, False, 'sum the BCE over classes', needs=loss('bce')),
    train('--bce-target-thresh', float, None, 'round mixed targets: above this to 1, others to 0', range='[0, 1]',
          needs=loss('bce')),
    train('--bce-pos-weight', float, None, 'weight of the positive term of BCE', range='(0, inf)', needs=loss('bce')),
    train('--loss-pos-weight', str, None, 'weight of positives (bce, asl): a number, a list with commas, a file, or '
          'the method neg_pos with --class-stats', metavar='W'),
    train('--loss-class-weight', str, None, 'weight of each class (ce, bce, asl): a number, a list with commas, a '
          'file, or a method with --class-stats: inv_freq or effective_num', metavar='W'),
    train('--loss-weight-power', float, 1.0, 'exponent of weights computed from --class-stats', range='[0, inf)',
          needs=given('class_stats')),
    train('--loss-weight-beta', float, 0.999, 'beta of --loss-class-weight effective_num', range='[0, 1)',
          needs=given('loss_class_weight')),
    train('--loss-weight-max', float, None, 'largest weight computed from --class-stats', range='(0, inf)', metavar='W',
          needs=given('loss_class_weight', 'loss_pos_weight')),
    train('--class-stats', str, '', 'JSON file with pos_counts and num_samples', path='file', needs=CLASS_STATS),
    train('--class-priors', str, '', 'CSV file of class priors', path='file', needs=loss('csl')),
    train('--asl-gamma-pos', float, 1.0, 'focusing parameter of positives', range='[0, inf)', needs=loss('asl')),
    train('--asl-gamma-neg', float, 4.0, 'focusing parameter of negatives', range='[0, inf)', needs=loss('asl')),
    train('--asl-clip', float, 0.05, 'margin of the probability of negatives', range='[0, 1)', needs=loss('asl')),
    train('--asl-reduction', str, 'batchmean', 'sum over classes and mean over images, sum, or mean',
          choices=('batchmean', 'sum', 'mean'), needs=loss('asl')),
    train('--twoway-tp', float, 4.0, 'temperature of positives', range='(0, inf)', needs=loss('twoway')),
    train('--twoway-tn', float, 1.0, 'temperature of negatives', range='(0, inf)', needs=loss('twoway')),
    train('--db-neg-scale', float, 2.0, 'scale of the logits of negatives', range='(0, inf)', needs=loss('db')),
    train('--db-init-bias', float, 0.05, 'factor of the logit shift by class frequency', needs=loss('db')),
    train('--db-focal-gamma', float, 2.0, 'focusing parameter', range='[0, inf)', needs=loss('db')),
    train('--poly-alpha', float, None, 'weight of positives of the poly loss', range='[0, 1]', needs=loss('poly')),
    train('--poly-gamma', float, 0.0, 'focusing parameter of the poly loss', range='[0, inf)', needs=loss('poly')),
    train('--poly-epsilon', float, 2.0, 'coefficient of the poly loss', needs=loss('poly')),
    train('--loss-kwargs', dict, {}, 'more arguments of the loss: asl_gamma_pos=0 (timm.loss), '
          'detach_focusing=True or mode=selective (timm_mldecoder.losses)', nargs='*'),
])

DISTILLS = given('kd_model_name', 'kd_checkpoint')
LOGITS = Need(lambda o: DISTILLS.holds(o) and o.kd_distill_type != 'feature', 'a teacher, and --kd-distill-type other '
              'than feature')
FEATURES = Need(lambda o: DISTILLS.holds(o) and o.kd_distill_type == 'feature', 'a teacher, and --kd-distill-type '
                'feature')
TOKEN = Need(lambda o: DISTILLS.holds(o) and o.kd_distill_type == 'token', 'a teacher, and --kd-distill-type token')

DISTILLATION: Group = ('Knowledge distillation', [
    train('--kd-model-name', str, None, 'teacher: a timm model with its pretrained weights, also hf-hub:... or '
          'local-dir:FOLDER'),
    train('--kd-checkpoint', str, '', 'teacher: a checkpoint of train.py, as it was trained; or a file of weights of '
          '--kd-model-name', path='file'),
    train('--kd-distill-type', str, 'logit', 'what the student learns from the teacher: logits, pooled features, or '
          'logits by the second classifier of a distilled model', choices=('logit', 'feature', 'token'),
          needs=DISTILLS),
    train('--kd-loss-type', str, 'kl', 'loss of logits', choices=('kl',), needs=LOGITS),
    train('--distill-loss-weight', float, None, 'weight of the distillation loss; if not given, 1 minus '
          '--task-loss-weight, or 1 without that', range='[0, inf)', metavar='W', needs=DISTILLS),
    train('--task-loss-weight', float, None, 'weight of the classification loss; 1 if not given', range='[0, inf)',
          metavar='W', needs=DISTILLS),
    train('--kd-temperature', float, 4.0, 'temperature of the softmax of both', range='(0, inf)', metavar='T',
          needs=LOGITS),
    train('--kd-student-feature-dim', int, None, 'width of the student features; that of the model if not given',
          range='[1, inf)', needs=FEATURES),
    train('--kd-teacher-feature-dim', int, None, 'width of the teacher features; that of the model if not given',
          range='[1, inf)', needs=FEATURES),
    train('--kd-token-distill-type', str, 'soft', 'token: learn the probabilities of the teacher, or its class',
          choices=('soft', 'hard'), needs=TOKEN),
])

OPTIMIZER: Group = ('Optimizer', [
    train('--opt', str, 'sgd', 'timm optimizer'),
    train('--opt-eps', float, None, 'epsilon of the optimizer', range='[0, inf)', needs=EPSILON),
    train('--opt-betas', float, None, 'betas of the optimizer', nargs='+', range='[0, 1)', needs=BETAS),
    train('--momentum', float, 0.9, 'momentum of the optimizer', range='[0, 1)', needs=MOMENTUM),
    train('--weight-decay', float, 2e-5, 'weight decay', range='[0, inf)'),
    train('--opt-kwargs', dict, {}, 'more arguments of the optimizer', nargs='*'),
    train('--clip-grad', float, None, 'largest gradient, by --clip-mode', range='(0, inf)'),
    train('--clip-mode', str, 'norm', 'clip the norm, each value, or adaptively', choices=('norm', 'value', 'agc'),
          needs=given('clip_grad')),
    train('--grad-accum-steps', int, 1, 'batches per optimizer step', range='[0, 1048576]'),
    train('--sam', float, 0.0, 'sharpness-aware minimization: radius rho; doubles the passes per step; 0: off',
          range='[0, inf)', metavar='RHO'),
    train('--layer-decay', float, None, 'factor of the learning rate from layer to layer', range='(0, 10]'),
    train('--layer-decay-min-scale', float, 0, 'smallest factor of layer decay', range='[0, 1]', needs=_LAYER_DECAY),
    train('--layer-decay-no-opt-scale', float, None, 'factor below which a layer is not trained', range='[0, 1]',
          needs=_LAYER_DECAY),
    train('--bias-lr-scale', float, 1.0, 'factor of the learning rate of biases', range='[0, inf)', needs=SCHEDULED),
    train('--head-lr-scale', float, 1.0, 'factor of the learning rate of the head', range='[0, inf)',
          needs=SCHEDULED),
])

SCHEDULE: Group = ('Learning rate and schedule', [
    train('--sched', str, 'cosine', 'schedule of the learning rate',
          choices=('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'onecycle',
                   'none')),
    train('--sched-on-updates', bool, False, 'change the learning rate after each optimizer step, not each epoch',
          needs=EPOCH_SCHEDULE),
    train('--lr', float, None, 'learning rate; computed from --lr-base if not given', range='[0, inf)', metavar='LR'),
    train('--lr-find', int, 0, 'learning rate range test in place of training: optimizer steps; 100 are usual, 0: off',
          range='[0, 1000000]', metavar='STEPS'),
    train('--lr-base', float, 0.1, 'learning rate for --lr-base-size images per step', range='(0, inf)', metavar='LR',
          needs=NO_LR),
    train('--lr-base-size', int, 256, 'images per optimizer step that --lr-base is for', range='[1, inf)', needs=NO_LR),
    train('--lr-base-scale', str, '', 'growth of --lr-base with the images per step; if empty, by the optimizer',
          choices=('', 'linear', 'sqrt'), needs=NO_LR),
    train('--epochs', int, 300, 'number of epochs, without cooldown', range='[1, 1000000]'),
    train('--start-epoch', int, None, 'epoch to start at; overrides that of a resumed checkpoint', range='[0, inf)'),
    train('--stop-epoch', int, None, 'stop after N epochs, with the schedule unchanged', range='[1, inf)'),
    train('--early-stop', int, None, 'stop after N validations without improvement; 10 if N is not given', nargs='?',
          const=10, range='[1, inf)'),
    train('--warmup-epochs', int, 5, 'epochs of warmup', range='[0, inf)', needs=SCHEDULED),
    train('--warmup-lr', float, 1e-5, 'learning rate at the start of warmup', range='[0, inf)', metavar='LR',
          needs=_WARMUP),
    train('--warmup-prefix', bool, False, 'start the schedule after warmup',
          needs=(_WARMUP, sched('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau'))),
    train('--cooldown-epochs', int, 0, 'epochs at --min-lr after the schedule', range='[0, inf)', needs=CYCLES),
    train('--min-lr', float, 0, 'learning rate at the end of the schedule', range='[0, inf)', metavar='LR',
          needs=sched('cosine', 'tanh', 'poly', 'plateau', 'wsd', 'rsqrt', 'onecycle')),
    train('--decay-milestones', int, [90, 180, 270], 'epochs of the steps', nargs='+', range='[1, inf)',
          needs=sched('multistep')),
    train('--decay-epochs', float, 90, 'epochs between steps; for wsd and rsqrt the length of the decay, as a share of '
          'the schedule if below 1; wsd and rsqrt: 0.2 if not given', range='(0, inf)',
          needs=sched('step', 'wsd', 'rsqrt')),
    train('--decay-rate --dr', float, 0.1, 'factor of each step; power of poly', range='(0, inf)',
          needs=sched('step', 'multistep', 'plateau', 'poly')),
    train('--patience-epochs', int, 10, 'epochs without improvement before a step', range='[0, inf)',
          needs=sched('plateau')),
    train('--lr-cycle-mul', float, 1.0, 'factor of the length of each cycle', range='(0, inf)', needs=CYCLES),
    train('--lr-cycle-decay', float, 0.5, 'factor of the learning rate of each cycle', range='(0, inf)', needs=CYCLES),
    train('--lr-cycle-limit', int, 1, 'number of cycles', range='[1, inf)', needs=CYCLES),
    train('--lr-k-decay', float, 1.0, 'exponent k of k-decay', range='(0, inf)', needs=sched('cosine', 'poly')),
    train('--lr-decay-fn', str, None, 'shape of the decay', choices=('linear', '1-sqrt', 'cosine', 'power', 'exp'),
          needs=sched('wsd', 'rsqrt')),
    train('--lr-stable-timescale', float, None, 'timescale of the stable phase, in epochs', range='(0, inf)',
          needs=sched('rsqrt')),
    train('--lr-noise', float, None, 'start, or start and end, of learning-rate noise, as shares of the epochs',
          nargs='+', range='[0, inf)', needs=EPOCH_SCHEDULE),
    train('--lr-noise-pct', float, 0.67, 'largest noise, as a share of the learning rate', range='[0, inf)',
          needs=_NOISE),
    train('--lr-noise-std', float, 1.0, 'standard deviation of the noise', range='[0, inf)', needs=_NOISE),
])
