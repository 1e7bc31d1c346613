"""A page in the browser: drop an image, see the labels of one or several models and what they look at.

    python -m timm_mldecoder.app output/train/RUN/model_best.pth.tar
    python -m timm_mldecoder.app FOLDER OTHER.pth.tar --word-embeddings words.safetensors

Each MODEL is a checkpoint of train.py, the folder of a run (whose best checkpoint is taken), or a folder that timm
loads with `local-dir:`. Models with text queries take the classes that one types, out of their own and those of
--word-embeddings. The page is served to this machine only, unless --host says otherwise, and loads nothing from
elsewhere.
"""

import argparse
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

import timm_mldecoder  # noqa: F401 - timm then builds models with an ML-Decoder head
from timm_mldecoder.data.word_embeddings import read_word_embeddings
from timm_mldecoder.distributed.world import check_device
from timm_mldecoder.flags.flag import number
from timm_mldecoder.head import MLDecoder
from timm_mldecoder.modeling.classes import Classes, other_classes
from timm_mldecoder.modeling.load import LoadedModel
from timm_mldecoder.modeling.load import load as load_model
from timm_mldecoder.models.attention_maps import attention_maps, attention_overlay, denormalise
from timm_mldecoder.runtime.errors import CommandParser, run_command

LABELS = 30  # rows of a list
TYPED = 1000  # classes that may be typed
HINT = 'Attention: click a label'
SIDE = 480  # of an attention picture, in pixels

# What gradio's page would load from elsewhere, such as fonts, the browser then refuses.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:"
)
STYLE = """
.list { display: flex; flex-direction: column; gap: 4px; }
.list button { position: relative; display: flex; justify-content: space-between; gap: 12px; padding: 5px 10px;
  border: 1px solid transparent; border-radius: 5px; background: var(--background-fill-secondary); cursor: pointer;
  font: inherit; color: inherit; text-align: left; overflow: hidden; }
.list button:disabled { cursor: default; }
.list button:not(:disabled):hover, .list button:focus-visible { border-color: var(--color-accent); }
.list button[aria-pressed=true] { border-color: var(--color-accent); font-weight: 600; }
.list i { position: absolute; inset: 0 auto 0 0; background: var(--color-accent); opacity: 0.22; }
.list u { position: absolute; inset: 0 auto 0 0; border-right: 2px dotted var(--body-text-color); opacity: 0.6; }
.list span { position: relative; overflow-wrap: anywhere; }
.list b { position: relative; font-variant-numeric: tabular-nums; font-weight: inherit; }
.list p, .title p { margin: 2px 0; color: var(--body-text-color-subdued); font-size: 14px; }
.list p.problem { color: var(--error-text-color); font-size: 15px; }
.title h3, .title p { margin: 0; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
#image img { width: 100%; height: 100%; object-fit: contain; }
"""
CLICK = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-index]');
  if (button && !button.disabled) trigger('click', { index: Number(button.dataset.index) });
});
"""


class Scores(NamedTuple):
    """What a model gives for an image: a score for each name, and the index of the label whose attention is shown."""

    names: list[str]
    scores: list[float]
    shown: int | None = None


class Shown:
    """A model on the page; it shows thresholds that were tuned per class.

    Classes may be typed from `more` label embeddings beside the model's own.
    """

    def __init__(self, name: str, loaded: LoadedModel, more: Classes | None) -> None:
        self.name = name
        self.loaded = loaded
        self.multilabel = loaded.thresholds is not None
        self._tuned: dict[str, float] = {}
        if loaded.content.get('thresholds') and loaded.thresholds is not None:
            self._tuned = dict(zip(loaded.class_names, loaded.thresholds.tolist(), strict=True))
        head = loaded.model.get_classifier()
        self.attends = isinstance(head, MLDecoder)
        self._device = next(loaded.model.parameters()).device
        self._lock = threading.Lock()  # classes of a model are changed for a while, and the page has several users
        self._rows: dict[str, Tensor] = {}
        if self.attends and head.vocabulary is not None:
            width = head.vocabulary.width
            if more is not None and more.embeddings.shape[1] != width:
                raise ValueError(f'--word-embeddings has width {more.embeddings.shape[1]}, {name} needs {width}')
            own = zip(head.class_names or [], head.vocabulary.embeddings.cpu(), strict=False)
            self._rows = {**dict(zip(more.names or (), more.embeddings, strict=True) if more else ()), **dict(own)}

    @property
    def vocabulary(self) -> list[str]:
        """Names that may be typed; empty for a model whose classes are fixed."""
        return list(self._rows)

    def about(self) -> str:
        """Return the title of the model as HTML."""
        kind = 'multi-label' if self.multilabel else 'single-label'
        size = ' x '.join(map(str, self.loaded.data_config['input_size'][1:]))
        text = f'{len(self.loaded.class_names)} classes, {kind}, {size} pixels'
        return f'<div class="title"><h3 title="{escape(self.name)}">{escape(self.name)}</h3><p>{escape(text)}</p></div>'

    def classes(self, typed: str | None) -> Classes | None:
        """Return the classes that were typed, one per line or separated by commas; None for the model's own.

        A browser sends None for the box of classes where it is hidden.

        Raises:
            ValueError: If a name is unknown, or there are too many.
        """
        names = list(
            dict.fromkeys(part.strip() for part in (typed or '').replace('\n', ',').split(',') if part.strip())
        )
        if not names or not self._rows:
            return None
        missing = [name for name in names if name not in self._rows]
        if missing:
            known = ', '.join(self.vocabulary[:5])
            raise ValueError(f'{self.name} has no embedding of {", ".join(missing[:5])}; it knows {known} and others')
        if len(names) > TYPED:
            raise ValueError(f'{len(names)} classes were typed, {TYPED} are allowed')
        return Classes(torch.stack([self._rows[name] for name in names]), names)

    @torch.inference_mode()
    def score(self, image: Image.Image, typed: str | None = None) -> Scores:
        """Score an image, for the classes that were typed or else the model's own.

        Raises:
            ValueError: If a class is unknown.
        """
        classes = self.classes(typed)
        with self._lock, other_classes(self.loaded.model, classes):
            scores = self.loaded.scores(self.loaded.model(self._images(image)))
        return Scores((classes and classes.names) or self.loaded.class_names, scores[0].tolist())

    @torch.inference_mode()
    def attention(self, image: Image.Image, names: Sequence[str], index: int) -> Image.Image:
        """Return a picture of what the query of one of the classes that were scored attends to.

        Raises:
            ValueError: If the head gives no map.
        """
        typed = list(names) != self.loaded.class_names
        classes = Classes(torch.stack([self._rows[name] for name in names]), list(names)) if typed else None
        images, config = self._images(image), self.loaded.data_config
        with self._lock, other_classes(self.loaded.model, classes):
            maps = attention_maps(self.loaded.model, images, torch.tensor([index], device=self._device))
        pixels = denormalise(images[0].float().cpu(), config['mean'], config['std'])
        return attention_overlay(pixels, maps[0].float().cpu(), SIDE)

    def _images(self, image: Image.Image) -> Tensor:
        return self.loaded.prepare(image)[None].to(self._device)

    @property
    def tuned(self) -> bool:
        """Whether the model has a tuned threshold per class."""
        return bool(self._tuned)

    def rows(self, found: Scores | None, threshold: float | None) -> str:
        """Return the list of labels as HTML, the likeliest first.

        Those are the labels of at least `threshold`; with None those that predict gives: of at least the tuned
        threshold of their class, or else 0.5. A single-label model then lists what reaches 0.05.
        """
        if found is None:
            return '<div class="list"><p>No image yet.</p></div>'
        order = sorted(range(len(found.names)), key=lambda index: -found.scores[index])
        default = (0.5 if self.multilabel else 0.05) if threshold is None else threshold
        tuned = self._tuned if threshold is None else {}
        reached = [index for index in order if found.scores[index] >= tuned.get(found.names[index], default)]
        buttons = ''.join(self._button(found, index) for index in reached[:LABELS])
        limit = 'their tuned thresholds' if tuned else f'{default:.2f}'
        text = f'{len(reached)} of {len(order)} classes reach {limit}'
        text += f', the first {LABELS} are shown' if len(reached) > LABELS else ''
        if not reached:
            text += f'; the highest is {found.names[order[0]]} with {found.scores[order[0]]:.3f}'
        text += '; dotted: tuned thresholds' if any(name in self._tuned for name in found.names) else ''
        return f'<div class="list">{buttons}<p>{escape(text)}</p></div>'

    def _button(self, found: Scores, index: int) -> str:
        name, score = found.names[index], found.scores[index]
        tick = f'<u style="width:{100 * self._tuned[name]:.2f}%"></u>' if name in self._tuned else ''
        return (
            f'<button data-index="{index}" aria-pressed="{str(index == found.shown).lower()}"'
            f'{"" if self.attends else " disabled"}><i style="width:{100 * score:.2f}%"></i>{tick}'
            f'<span>{escape(name)}</span><b>{score:.3f}</b></button>'
        )


def load(place: str, arguments: argparse.Namespace, more: Classes | None) -> Shown:
    """Load a checkpoint, folder, or pretrained timm model for the page.

    Raises:
        ValueError: If there is no model.
    """
    loaded = load_model(place, arguments.device, task=arguments.task)
    path = Path(place).resolve()
    name = f'{path.parent.name}/{path.name}' if path.is_file() else path.name
    return Shown(name.lstrip('/'), loaded, more)


def build(models: Sequence[Shown], max_size: int) -> Any:
    """Return the page as `gradio.Blocks`, with the models side by side; `max_size` is that of an upload in MB."""
    gradio = _gradio()

    def predict(image: Image.Image | str | None, typed: str | None, threshold: float, tuned: bool) -> list[Any]:
        values: list[Any] = []
        for shown in models:
            found, message = None, image if isinstance(image, str) else ''
            if isinstance(image, Image.Image):
                try:
                    found = shown.score(image, typed)
                except ValueError as error:
                    message = str(error)
            content = _problem(message) if message else shown.rows(found, None if tuned else threshold)
            values += [found, content, gradio.Image(None, label=HINT)]
        return values

    def move(threshold: float, tuned: bool, *found: Scores | None) -> Any:
        limit = None if tuned else threshold
        lists = [shown.rows(one and Scores(*one), limit) for shown, one in zip(models, found, strict=True)]
        return lists if len(lists) > 1 else lists[0]

    title = 'ML-Decoder' if len(models) > 1 else models[0].name
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page, gradio.Row():
        with gradio.Column(scale=2, min_width=300):
            image, threshold, tuned, typed, button = _inputs(models, max_size)
        with gradio.Column(scale=3, min_width=300), gradio.Row(equal_height=False):
            states, lists, pictures = zip(*map(_outputs, range(len(models)), models), strict=True)
        outputs = [part for parts in zip(states, lists, pictures, strict=True) for part in parts]
        inputs = [image, typed, threshold, tuned]
        image.change(predict, inputs, outputs, api_name='predict')
        for event in (button.click, typed.submit):
            event(predict, inputs, outputs, api_name=False)
        quiet = dict(show_progress='hidden', api_name=False)
        threshold.input(lambda: False, None, tuned, **quiet)  # who moves the slider wants one threshold for all
        threshold.change(lambda value, *found: move(value, False, *found), [threshold, *states], lists, **quiet)
        tuned.input(move, [threshold, tuned, *states], lists, **quiet)
        for shown, state, one, picture in zip(models, states, lists, pictures, strict=True):
            if shown.attends:
                one.click(_attend(shown), [image, state, threshold, tuned], [picture, one, state], api_name=False)
    return page


def _inputs(models: Sequence[Shown], max_size: int) -> tuple[Any, ...]:
    """Add what a user sets: the image, the threshold, whether the tuned ones count, typed classes and their button."""
    gradio = _gradio()
    known = list(dict.fromkeys(name for shown in models for name in shown.vocabulary))
    start = 0.5 if all(shown.multilabel for shown in models) else 0.05
    tunes = any(shown.tuned for shown in models)
    image = gradio.Image(
        label=f'Image, at most {max_size} MB', sources=['upload', 'clipboard'], elem_id='image', height=380
    )
    image.preprocess = _read_upload  # a derived class would make gradio write a stub beside this file
    threshold = gradio.Slider(0, 1, start, step=0.01, label='Threshold', elem_id='threshold')
    tuned = gradio.Checkbox(tunes, visible=tunes, label='Tuned thresholds', elem_id='tuned')
    typed = gradio.Textbox(
        label='Classes', lines=2, max_lines=8, visible=bool(known), elem_id='classes',
        info='Separated by commas; press the button to score them. Empty: the classes of the model.',
        placeholder=', '.join(known[:4]),
    )  # fmt: skip
    button = gradio.Button('Score these classes', visible=bool(known), elem_id='score', variant='primary')
    return image, threshold, tuned, typed, button


def _outputs(number: int, shown: Shown) -> tuple[Any, Any, Any]:
    """Add the column of a model; return its scores, its list of labels and its picture."""
    gradio = _gradio()
    with gradio.Column(min_width=260):
        gradio.HTML(shown.about())
        state = gradio.State()
        picture = gradio.Image(
            label=HINT, interactive=False, visible=shown.attends, format='png', buttons=[],
            elem_id=f'attention-{number}', height=300,
        )  # fmt: skip
        labels = gradio.HTML(shown.rows(None, None), js_on_load=CLICK, elem_id=f'labels-{number}')
    return state, labels, picture


def _attend(shown: Shown) -> Callable[..., tuple]:
    """Return the handler of a click on a label, which shows its attention."""
    gradio = _gradio()

    def show(image: Any, found: Scores | None, threshold: float, tuned: bool, event: gradio.EventData) -> tuple:  # type: ignore[name-defined]  # of the extra
        found, index = found and Scores(*found), event.index
        limit = None if tuned else threshold
        if not isinstance(image, Image.Image) or found is None or not 0 <= index < len(found.names):
            return None, shown.rows(found, limit), found
        found = found._replace(shown=index)
        try:
            picture, label = shown.attention(image, found.names, index), f'Attention: {found.names[index]}'
        except ValueError as error:
            picture, label = None, str(error)
        return gradio.Image(picture, label=label), shown.rows(found, limit), found

    return show


def _read_upload(payload: Any) -> Image.Image | str | None:
    """Return an upload as an image; for a file that is not one, what is wrong with it."""
    if payload is None or payload.path is None:
        return None
    name = payload.orig_name or 'the file'
    try:
        with Image.open(payload.path) as image:
            return image.copy()
    except Image.DecompressionBombError:
        return f'{name} has too many pixels: {2 * (Image.MAX_IMAGE_PIXELS or 0):,} are allowed'
    except Exception:  # damaged bytes make PIL's decoders raise anything
        return f'{name} is not an image that can be read'


def _problem(message: str) -> str:
    return f'<div class="list"><p class="problem" role="alert">{escape(message)}</p></div>'


class _Policy:
    """ASGI middleware that adds the policy of the page to every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message['type'] == 'http.response.start':
                message['headers'] = [*message['headers'], (b'content-security-policy', POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def _gradio() -> Any:
    """Return gradio, without its telemetry; a ValueError if it is not installed."""
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # read when gradio is imported
    os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
    try:
        import gradio
    except ImportError as error:
        raise ValueError("the page needs gradio: pip install 'timm-mldecoder[app]'") from error
    return gradio


def launch(page: Any, arguments: argparse.Namespace, block: bool = True) -> str:
    """Serve a page, and return its address.

    Raises:
        ValueError: If the port is taken.
    """
    if not arguments.host.strip():  # an unset variable must not open the page to every network
        raise ValueError('--host is empty: pass 127.0.0.1, or 0.0.0.0 for all networks')
    gradio = _gradio()
    from starlette.middleware import Middleware

    logging.getLogger('httpx').setLevel(logging.WARNING)  # gradio calls its own server at the start
    fonts = dict(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace'])
    theme = gradio.themes.Default(primary_hue='blue', secondary_hue='blue', **fonts)
    subdued = dict.fromkeys(['body_text_color_subdued', 'block_info_text_color', 'input_placeholder_color'], '#5b6472')
    family = socket.AF_INET6 if ':' in arguments.host else socket.AF_INET
    try:  # gradio would try a hundred ports of an address that is not this machine's
        socket.create_server((arguments.host, arguments.port or 0), family=family).close()
        _, address, _ = page.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            share=False,
            max_file_size=f'{arguments.max_size}mb',
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            quiet=True,
            prevent_thread_lock=True,
            css=STYLE,
            theme=theme.set(**subdued),
            app_kwargs={'middleware': [Middleware(_Policy)]},
        )
    except (OSError, OverflowError, TypeError, UnicodeError) as error:  # the last two: not the name of a host
        raise ValueError(f'--host {arguments.host} --port {arguments.port}: {error}') from error
    print(f'{address}  (Ctrl-C ends it)', flush=True)
    if block:
        page.block_thread()
    return address


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page with the options of a command line."""
    arguments = _parse(argv)
    _gradio()
    if arguments.device == 'auto':
        arguments.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    check_device(arguments.device)
    more = None
    if arguments.word_embeddings:
        more = Classes(*read_word_embeddings(arguments.word_embeddings))
        if more.names is None:
            raise ValueError(f'--word-embeddings {arguments.word_embeddings}: the file does not name its classes')
    models = [load(place, arguments, more) for place in arguments.models]
    if more is not None and not any(shown.vocabulary for shown in models):
        raise ValueError('--word-embeddings needs a model with text queries; the classes of these models are fixed')
    launch(build(models, arguments.max_size), arguments)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser('python -m timm_mldecoder.app', __doc__)
    add = parser.add_argument
    add('models', nargs='+', metavar='MODEL', help='checkpoint of train.py, folder of a run, or folder for local-dir:')
    add('--word-embeddings', type=Path, help='label embeddings of classes to type, for models with text queries')
    add('--task', choices=['classification', 'multilabel'], help='task of folders that do not know their own')
    add('--device', default='auto', help='device; auto takes the GPU if there is one (default: %(default)s)')
    add('--host', default='127.0.0.1', help='address to serve; 0.0.0.0 for all networks (default: %(default)s)')
    add('--port', type=int, help='port (default: the first free one from 7860)')
    add('--max-size', type=number(int, '[1, 1024]'), default=20, help='largest upload in MB (default: %(default)s)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    sys.exit(run_command(main))
