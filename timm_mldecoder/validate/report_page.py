"""The page of `validate.py --report`: one HTML file that needs nothing else, with every text in it escaped."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from PIL import Image

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1f2430; background: #f6f7f9; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 4px; }
p { margin: 0 0 12px; color: #5b6472; max-width: 75ch; }
section { background: #fff; border: 1px solid #e1e4ea; border-radius: 8px; padding: 16px 18px; margin-top: 18px;
  overflow-x: auto; }
.row { display: flex; flex-wrap: wrap; gap: 0 18px; } .row section { max-width: 100%; box-sizing: border-box; }
.row section { min-width: min(330px, 100%); } .row section:last-child { flex: 1; }
.row p { width: 0; min-width: 100%; }
dl { display: flex; flex-wrap: wrap; gap: 10px 26px; margin: 14px 0 0; }
dt { color: #5b6472; font-size: 12px; } dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: left; color: #5b6472; font-weight: 600; border-bottom: 1px solid #ccd1da; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid #2563a8; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
th, td { padding: 4px 12px 4px 0; } td + td, th + th { padding-left: 4px; }
td { max-width: 340px; overflow-wrap: anywhere; border-bottom: 1px solid #eef0f3; }
td.number, th.number { text-align: right; }
.matrix td { text-align: center; min-width: 26px; padding: 3px 4px; border: 1px solid #fff; }
.matrix th { font-size: 12px; padding: 3px 6px; border: 0; }
.matrix thead th.column { vertical-align: bottom; }
.matrix thead th.column span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 120px;
  overflow: hidden; white-space: nowrap; text-overflow: ellipsis; display: inline-block; }
.curves, .errors { display: flex; flex-wrap: wrap; gap: 14px; }
figure { margin: 0; } figcaption { font-size: 13px; overflow-wrap: anywhere; } figcaption small { color: #5b6472; }
.curves figure { width: 172px; } .curves svg { width: 170px; height: 170px; background: #fafbfc; overflow: visible; }
.errors > figure { border: 1px solid #e1e4ea; border-radius: 6px; padding: 10px; }
.pictures { display: flex; gap: 8px; margin-top: 6px; } .pictures figure { width: 112px; }
.pictures img { width: 112px; display: block; border-radius: 3px; }
.missed { color: #9a5b00; } .wrong { color: #b3261e; } .right { color: #2b6b3f; }
"""

SCRIPT = """
for (const head of document.querySelectorAll('.sortable th')) head.firstChild.addEventListener('click', () => {
  const number = head.classList.contains('number'), order = head.getAttribute('aria-sort');
  const down = order ? order === 'ascending' : number, column = head.cellIndex;
  for (const other of head.parentNode.children) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const body = head.closest('table').tBodies[0], text = row => row.cells[column].textContent;
  const value = row => text(row) === '' ? -Infinity : Number(text(row));
  const compare = (a, b) => number ? Math.sign(value(a) - value(b) || 0) : text(a).localeCompare(text(b));
  body.append(...[...body.rows].sort((a, b) => (down ? -1 : 1) * compare(a, b)));
});
"""


class Curve(NamedTuple):
    """Precision and recall of one class."""

    name: str
    ap: float  # average precision in percent
    points: list[tuple[float, float]]  # recall and precision at every threshold, from the highest
    threshold: float  # the chosen threshold
    chosen: tuple[float, float] | None  # recall and precision at the chosen threshold; None where nothing is predicted


class Picture(NamedTuple):
    """A picture under an error: the image, or the attention of one class; `kind` is a CSS class of the caption."""

    image: Image.Image
    caption: str
    kind: str = ''


class Mistake(NamedTuple):
    """An image that was scored wrongly."""

    name: str
    text: str
    pictures: list[Picture]


def render(title: str, facts: Mapping[str, str], sections: Sequence[str]) -> str:
    """Return the page: a title, facts by name, and sections of HTML."""
    shown = ''.join(f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>' for name, value in facts.items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # the browser then refuses whatever a mistake in this file would let in
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f'<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main><h1>{escape(title)}</h1>'
        f'<dl>{shown}</dl>\n{"".join(sections)}</main><script>{SCRIPT}</script></body></html>\n'
    )


def section(title: str, text: str, content: str, ident: str) -> str:
    """Return a section: a title, a sentence, and HTML."""
    return f'<section id="{ident}"><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>\n'


def row(*sections: str) -> str:
    """Return sections side by side."""
    return f'<div class="row">{"".join(sections)}</div>'


def table(columns: Mapping[str, int | None], rows: Sequence[Sequence[str | float | None]]) -> str:
    """Return a table that sorts by a click on a column; columns have the decimals of numbers, None for text."""
    marks = ['' if decimals is None else ' class="number"' for decimals in columns.values()]
    titles = zip(columns, marks, strict=True)
    head = ''.join(f'<th{mark}><button>{escape(title)}</button></th>' for title, mark in titles)
    body = ''
    for values in rows:
        cells = zip(values, columns.values(), marks, strict=True)
        body += f'<tr>{"".join(f"<td{mark}>{_cell(value, decimals)}</td>" for value, decimals, mark in cells)}</tr>\n'
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>'


def _cell(value: str | float | None, decimals: int | None) -> str:
    if value is None:
        return ''
    return escape(str(value)) if decimals is None else f'{value:.{decimals}f}'


def confusion_matrix(names: Sequence[str], counts: Mapping[tuple[int, int], int]) -> str:
    """Return a table of counts: rows are labels, columns predictions, the colour is the share of the row."""
    head = ''.join(f'<th class="column"><span title="{escape(name)}">{escape(name)}</span></th>' for name in names)
    rows = []
    for label, name in enumerate(names):
        total = sum(counts.get((label, predicted), 0) for predicted in range(len(names)))
        cells = []
        for predicted, other in enumerate(names):
            count = counts.get((label, predicted), 0)
            share = count / total if total else 0
            hue = '43,107,63' if label == predicted else '179,38,30'
            ink = ';color:#fff' if share > 0.55 else '' if count else ';color:#b9bfc9'
            title = escape(f'{name} predicted as {other}: {count} of {total}')
            cells.append(f'<td title="{title}" style="background:rgba({hue},{share:.3f}){ink}">{count}</td>')
        rows.append(f'<tr><th>{escape(name)}</th>{"".join(cells)}</tr>\n')
    return (
        f'<table class="matrix"><thead><tr><th>label \\ predicted</th>{head}</tr></thead>'
        f'<tbody>\n{"".join(rows)}</tbody></table>'
    )


def curves(found: Sequence[Curve]) -> str:
    """Return a small diagram per class, recall to the right and precision upwards, both from 0 to 1."""
    figures = []
    for curve in found:
        points = ' '.join(f'{recall:.5g},{precision:.5g}' for recall, precision in curve.points)
        dot = ''
        if curve.chosen:
            x, y = curve.chosen
            dot = f'<circle cx="{x:.5g}" cy="{y:.5g}" r="0.03" fill="#d4570a"/>'
        grid = ''.join(f'<path d="M0 {at}H1M{at} 0V1"/>' for at in (0, 0.5, 1))
        label = escape(f'precision and recall of {curve.name}')
        figures.append(
            f'<figure><svg viewBox="0 0 1 1" role="img" aria-label="{label}"><g transform="matrix(1 0 0 -1 0 1)" '
            f'fill="none" stroke-width="0.014"><g stroke="#dfe3e9" stroke-width="0.006">{grid}</g>'
            f'<polyline stroke="#2563a8" points="{points}"/>{dot}</g></svg><figcaption>{escape(curve.name)}<br>'
            f'<small>AP {curve.ap:.2f}, threshold {curve.threshold:.3f}</small></figcaption></figure>\n'
        )
    return f'<div class="curves">\n{"".join(figures)}</div>'


def gallery(mistakes: Sequence[Mistake]) -> str:
    """Return pictures of mistakes."""
    figures = []
    for mistake in mistakes:
        pictures = ''.join(
            f'<figure><img alt="" src="{_data_uri(picture.image)}"><figcaption class="{picture.kind}">'
            f'{escape(picture.caption)}</figcaption></figure>'
            for picture in mistake.pictures
        )
        figures.append(
            f'<figure><figcaption>{escape(mistake.name)}<br><small>{escape(mistake.text)}</small></figcaption>'
            f'<div class="pictures">{pictures}</div></figure>\n'
        )
    return f'<div class="errors">\n{"".join(figures)}</div>'


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=85)
    return f'data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}'
