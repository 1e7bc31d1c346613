"""Put an ML-Decoder head on every model of the installed timm, and write the results to docs/models.md.

    python -m benchmarks.survey [--write] [--names NAME ...]

Models are built on the meta device (shapes without values), with one forward and one backward pass each. Prints the
number of names, attached, refused and failed. Exit status 1 if any failed.
"""

import argparse
import json
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import timm
import torch

from timm_mldecoder.models.families import FAMILIES, RULE

PAGE = Path(__file__).resolve().parents[1] / 'docs' / 'models.md'
HEAD = dict(decoder_embedding=64, dim_feedforward=64)
NAMES_PER_PROCESS = 100  # a crash loses no more
LIMITS = """## What to know

- Only `timm.create_model` takes `ml_decoder` and `cosine_classifier`. Model functions (`timm.models.resnet18`) and
  `torch.hub.load` do not: call `timm_mldecoder.add_ml_decoder_head` on the model that they return.
- `TIMM_MLDECODER_AUTOLOAD=0`, or torch's `TORCH_DEVICE_BACKEND_AUTOLOAD=0`, turns the plug-in off until a program
  imports `timm_mldecoder`.
- The dropout of timm's classifier is disabled: `drop_rate` is 0 afterwards. The head's own option is `dropout`.
- `num_classes=0` and `features_only=True` give timm's own model, without a head, also from a stored model with a head.
  `ml_decoder=False` loads the backbone of a stored head under a fresh linear classifier. Modules that a family below
  removes (class attention, attention pooling) are not stored with a head: they start fresh, with a warning.
- A stored head keeps its options where none are given; with `pretrained=True` others are an error. For another number
  of classes `embed` and `layers` are loaded, the rest starts fresh; `ml_decoder={'fresh_head': True}` draws all anew.
- `prefix_tokens=True`: the head also reads class, distillation and register tokens. The published code and timm's own
  layer read all tokens that they are given; the comment in the code has 197, so with the class token. Projects differ:
  IDEA, CheXFound and users of open_clip leave it out.
- `head_norm=False`: the head reads the features in front of the classifier's own norm (`head.norm` of ConvNeXt and
  DaViT, `fc_norm` of ViTs with average pooling), which is removed. The published `add_ml_decoder_head` replaces the
  norm together with the classifier.
- `num_of_groups` above the number of classes is reduced to it, with a warning.
- fx tracing works where timm's model traces. `torch.jit.script` does not: use `torch.compile` or `torch.export`.
"""


def attach(name: str) -> dict:
    """Build one model with a head and run it; return the outcome."""
    module = timm.model_entrypoint(name).__module__.rpartition('.')[2]
    result = dict(name=name, module=module, cls='', family='', outcome='failed', detail='')
    try:
        with torch.device('meta'):
            model = timm.create_model(name, ml_decoder=HEAD, num_classes=7)
            ancestors = [cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith('timm.')]
            result['cls'] = ancestors[0]
            result['family'] = next((cls for cls in ancestors if cls in FAMILIES), '')
            check(model)
            result['outcome'] = 'attached'
    except Exception as error:  # any error belongs to this name and is reported
        refused = isinstance(error, ValueError) and 'cannot take an ML-Decoder head' in str(error)
        result['outcome'] = 'refused' if refused else 'failed'
        result['detail'] = str(error) if refused else traceback.format_exc(limit=-2)
    return result


def check(model: torch.nn.Module) -> None:
    """Check the shapes of logits and pre-logits, all gradients, and that the head sees more than one token."""
    seen: list = []
    model.get_classifier().register_forward_pre_hook(lambda module, args: seen.extend(args[:1]))
    images = torch.randn(2, *model.pretrained_cfg['input_size'])
    logits = model.train()(images)
    assert logits.shape == (2, 7), f'logits {tuple(logits.shape)}'
    scales = seen[0] if isinstance(seen[0], list) else seen
    assert all(scale.shape[1] > 1 for scale in scales), f'tokens {[tuple(scale.shape) for scale in scales]}'
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size), f'pre-logits {tuple(pooled.shape)}'
    logits.sum().backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, f'parameters without a gradient: {unused[:5]}'


def attach_all(names: list[str]) -> list[dict]:
    """Call `attach` for many names, in one process after the other."""
    results = []
    for start in range(0, len(names), NAMES_PER_PROCESS):
        chunk = names[start : start + NAMES_PER_PROCESS]
        process = subprocess.run(
            [sys.executable, __file__, '--worker', '--names', *chunk], capture_output=True, text=True
        )
        done = [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{')]
        results += done
        lost = chunk[len(done) :]
        results += [
            dict(name=name, module='', cls='', family='', outcome='failed', detail=process.stderr) for name in lost
        ]
        print(f'{len(results)} of {len(names)}', file=sys.stderr, flush=True)
    return results


def page(results: list[dict]) -> str:
    """Return the documentation page."""
    attached = [result for result in results if result['outcome'] == 'attached']
    lines = [
        '# Which models take the head',
        '',
        f'Written by `make models` with timm {timm.__version__} and torch {torch.__version__.partition("+")[0]}: every '
        'name of `timm.list_models()`, built on the meta device with `ml_decoder=`, one forward and one backward pass. '
        'A model counts as attached if it gives logits, the head saw more than one token, pre-logits have '
        '`head_hidden_size` columns and every parameter gets a gradient.',
        '',
        f'**{summary(results)}**',
        '',
        f'The rule: {RULE.why}. The head does not see class, distillation and register tokens, unless '
        '`prefix_tokens=True` is given; attention pooling is removed.',
        '',
        *LIMITS.splitlines(),
        '',
        '## Exceptions',
        '',
        '| timm class | names | what differs |',
        '|---|---|---|',
    ]
    uses = Counter(result['family'] for result in attached)
    lines += [f'| {cls} | {uses[cls]} | {family.why} |' for cls, family in FAMILIES.items() if uses[cls]]
    lines += ['', '## Refused', '', '| names | reason |', '|---|---|']
    refused = [result for result in results if result['outcome'] == 'refused']
    for reason in sorted({_reason(result) for result in refused}):
        names = ', '.join(result['name'] for result in refused if _reason(result) == reason)
        lines.append(f'| {names} | {reason} |')
    lines += ['', '## Family by family', '', '| timm module | names | attached | classes |', '|---|---|---|---|']
    for module in sorted({result['module'] for result in results}):
        names = sum(result['module'] == module for result in results)
        here = [result for result in attached if result['module'] == module]
        lines.append(f'| {module} | {names} | {len(here)} | {", ".join(sorted({r["cls"] for r in here}))} |')
    return '\n'.join(lines) + '\n'


def _reason(result: dict) -> str:
    """Return why a model was refused, without the name of its class."""
    return result['detail'].partition(': ')[2]


def summary(results: list[dict]) -> str:
    count = Counter(result['outcome'] for result in results)
    return (
        f'names {len(results)}, attached {count["attached"]}, refused with reason {count["refused"]}, '
        f'failed {count["failed"]}'
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('--names', nargs='+', help='only these names')
    parser.add_argument('--write', action='store_true', help=f'write {PAGE.name}')
    parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)  # prints one JSON line per name
    options = parser.parse_args()
    names = options.names or timm.list_models()
    if options.worker:
        for name in names:
            print(json.dumps(attach(name)), flush=True)
        return 0
    results = attach_all(names)
    failed = [result for result in results if result['outcome'] == 'failed']
    for result in failed:
        print(f'{result["name"]}: {result["detail"]}')
    print(summary(results))
    if options.write:
        PAGE.write_text(page(results))
    return bool(failed)


if __name__ == '__main__':
    sys.exit(main())
