"""The page of `check --report`: counts, and thumbnails of what looks alike."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from timm_mldecoder.check.findings import KINDS, Finding, Split
from timm_mldecoder.loading.scan import THUMBNAIL
from timm_mldecoder.runtime.files import utf8, write_atomically
from timm_mldecoder.validate.report_page import Mistake, Picture, gallery, render, section, table

SHOWN = 200  # groups of pictures, and rows of a table


def write_page(path: Path, title: str, splits: Mapping[str, Split], found: Sequence[Finding]) -> None:
    """Write one HTML file that needs nothing else."""
    counts = {kind: sum(finding.kind == kind for finding in found) for kind in KINDS}
    sections = []
    for kind, meaning in KINDS.items():
        part = [finding for finding in found if finding.kind == kind][:SHOWN]
        if not part:
            continue
        if part[0].images:
            content = gallery([_pictures(finding, splits) for finding in part])
        else:
            rows = [[utf8(file), utf8(finding.text)] for finding in part for file in (finding.files or ('',))[:SHOWN]]
            content = table({'file': None, 'what': None}, rows)
        sections.append(section(kind.capitalize(), f'{counts[kind]:,}: {meaning}.', content, kind.replace(' ', '-')))
    names = splits['train'].class_names
    columns = {'class': None, **{role: 0 for role, split in splits.items() if split.labels is not None}}
    per_class = zip(names, *(split.counts() for split in splits.values() if split.labels is not None), strict=False)
    sections.append(
        section('Classes', 'Images of each class.', table(columns, [list(row) for row in per_class]), 'all')
    )
    facts = {role: f'{len(split.facts):,} images' for role, split in splits.items()}
    facts |= {kind: f'{number:,}' for kind, number in counts.items() if number}
    html = render(utf8(title), facts, sections)
    write_atomically(path, lambda file: file.write(html.encode()))


def _pictures(finding: Finding, splits: Mapping[str, Split]) -> Mistake:
    pictures = []
    for role, position in finding.images[:8]:
        facts = splits[role].facts[position]
        image = Image.frombytes('RGB', (THUMBNAIL, THUMBNAIL), facts.thumbnail)
        try:
            with Image.open(facts.path) as opened:
                image = opened.convert('RGB')
                image.thumbnail((112, 112))
        except Exception:  # no file of its own, or changed meanwhile: the small thumbnail has to do
            image = image.resize((112, 112))
        pictures.append(Picture(image, utf8(f'{facts.path} ({role}): {splits[role].shown(position)}')))
    return Mistake('', f'{len(finding.images)} images', pictures)
