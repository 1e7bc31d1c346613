"""Make a file of label embeddings from class names.

    python -m timm_mldecoder.data.embed NAMES OUT.safetensors --text-vectors glove.6B.300d.txt
    python -m timm_mldecoder.data.embed NAMES OUT.safetensors --sentence-transformer FOLDER
    python -m timm_mldecoder.data.embed NAMES OUT.safetensors --clip MODEL --clip-weights FILE
    python -m timm_mldecoder.data.embed ROOT OUT.safetensors --nus-wide

NAMES is a text file with one class per line, optionally followed by a tab and the text to embed instead of the name
(`tv`, tab, `television`). OUT holds the embeddings [C, E] and, as metadata, the names, the source and the rule. Nothing
is downloaded. `--nus-wide` uses the word vectors that come with the dataset in the folder ROOT.

The rule for text vectors (GloVe, fastText, word2vec in text form; one token and its numbers per line): a text is looked
up unchanged, then in lower case, each also with `-` and with `_` for its blanks. Otherwise its embedding is the mean of
the vectors of its words (split at blanks, `-`, `_`, `/` and `'`), each looked up unchanged, then in lower case; words
without a vector are left out and logged. Texts without any known word are an error that lists all of them.
"""

import argparse
import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from timm_mldecoder.data.formats.nus_wide import read_word_vectors
from timm_mldecoder.data.text_files import read_names
from timm_mldecoder.data.word_embeddings import write_word_embeddings
from timm_mldecoder.runtime.errors import CommandParser, run_command

_logger = logging.getLogger(__name__)

TEMPLATE = 'a photo of a {}'
WORD_BREAKS = re.compile(r"[\s\-_/']+")


def read_labels(path: Path) -> dict[str, str]:
    """Classes of a text file, one per line, and the text of each: that after a tab, or else its name.

    Raises:
        ValueError: If the file is missing, or a name is repeated or empty.
    """
    if not path.is_file():
        raise ValueError(f'{path} is missing: expected a file of class names, one per line')
    labels = [[part.strip() for part in line.split('\t', 1)] for line in read_names(path)]
    names = [name for name, *_ in labels]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not all(map(all, labels)):
        raise ValueError(f'{path}: every line needs a distinct name, and a text after a tab; repeated: {repeated}')
    return {label[0]: label[-1] for label in labels}


def embed_with_text_vectors(texts: Sequence[str], path: Path) -> Tensor:
    """Vectors [C, E] of texts by a file of word vectors and the rule of the module.

    Raises:
        ValueError: If the file is malformed, or a text has no known word.
    """
    wanted = {form for text in texts for part in (text, *_words(text)) for form in _forms(part)}
    vectors = _read_vectors(path, wanted)

    def find(text: str) -> Tensor | None:
        return next((vectors[form] for form in _forms(text) if form in vectors), None)

    rows: list[Tensor] = []
    unknown, left_out = [], []
    for text in texts:
        whole, parts = find(text), {word: find(word) for word in _words(text)}
        known = [whole] if whole is not None else [vector for vector in parts.values() if vector is not None]
        if whole is None and known:
            left_out += [f'{word} of {text}' for word, vector in parts.items() if vector is None]
        if known:
            rows.append(torch.stack(known).mean(dim=0))
        else:
            unknown.append(text)
    if unknown:
        raise ValueError(f'{path} has no vector for {unknown}: add a text of known words to the names, after a tab')
    if left_out:
        _logger.warning(f'left out, without a vector: {", ".join(left_out)}')
    return torch.stack(rows)


def _forms(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(blank.join(case.split()) for case in (text, text.lower()) for blank in ' -_'))


def _words(text: str) -> list[str]:
    return [word for word in WORD_BREAKS.split(text) if word]


def _read_vectors(path: Path, wanted: set[str]) -> dict[str, Tensor]:
    """The wanted vectors of a text file, which may have many gigabytes."""
    if not path.is_file():
        raise ValueError(f'--text-vectors {path}: no such file')
    vectors: dict[str, Tensor] = {}
    with path.open(encoding='utf-8', errors='replace') as file:
        for number, line in enumerate(file, start=1):
            token, *numbers = line.rstrip().split(' ')
            if token not in wanted or token in vectors or (number == 1 and len(numbers) == 1):  # fastText's header
                continue
            try:
                vectors[token] = torch.tensor([float(value) for value in numbers])
            except ValueError as error:
                raise ValueError(f'{path}, line {number}: expected a token and numbers, got {line[:80]!r}') from error
    widths = sorted({len(vector) for vector in vectors.values()})
    if len(widths) > 1:
        raise ValueError(f'{path}: expected vectors of one width, got {widths}')
    return vectors


def embed_with_sentence_transformer(texts: Sequence[str], path: Path) -> Tensor:
    """Embeddings [C, E] of texts by a sentence-transformers model on disk.

    Raises:
        ValueError: If the folder does not hold such a model, or sentence-transformers is not installed.
    """
    if not path.is_dir():
        raise ValueError(f'--sentence-transformer {path}: no such folder')
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError("--sentence-transformer: pip install 'timm-mldecoder[text]'") from error
    with _loading(f'--sentence-transformer {path}'):
        model = SentenceTransformer(str(path), device='cpu', local_files_only=True)
    return model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False).float()


def embed_with_clip(texts: Sequence[str], model_name: str, weights: str | None, template: str = TEMPLATE) -> Tensor:
    """Embeddings [C, E] of texts in a template by the text tower of a CLIP model, each of length 1.

    Raises:
        ValueError: If there is no such model, it does not load the weights, or open_clip is not installed.
    """
    if not model_name.startswith('local-dir:') and not Path(weights or '').is_file():
        raise ValueError(f'--clip {model_name}: pass a file of its weights as --clip-weights, got {weights!r}')
    try:
        import open_clip
    except ImportError as error:
        raise ValueError("--clip: pip install 'timm-mldecoder[text]'") from error
    with _loading(f'--clip {model_name} --clip-weights {weights}'):
        model = open_clip.create_model(model_name, pretrained=weights).eval()
        tokenizer = open_clip.get_tokenizer(model_name)
    tokens = tokenizer([template.format(text) for text in texts])
    with torch.no_grad():
        return model.encode_text(tokens, normalize=True).float()


@contextlib.contextmanager
def _loading(flags: str) -> Iterator[None]:
    """Turn any error while a model is loaded into one line that names the flags."""
    try:
        yield
    except Exception as error:  # the libraries raise many types of exceptions on files that are not models
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise ValueError(f'{flags}: cannot load the model: {reason:.300}') from error


def check(options: argparse.Namespace) -> None:
    """Raise a ValueError for a file that cannot be written and a wrong template, before anything is computed."""
    if options.out.suffix != '.safetensors':
        raise ValueError(f'{options.out}: the file to write must end in .safetensors')
    if not options.out.parent.is_dir() or options.out.is_dir():
        raise ValueError(f'{options.out}: expected a file in an existing folder')
    if any(options.template.count(part) != 1 for part in ('{}', '{', '}')):
        raise ValueError(f'--template {options.template!r}: expected one {{}} for the name')


def embed(options: argparse.Namespace) -> tuple[Tensor, list[str], dict[str, str]]:
    """Embeddings [C, E], class names, and metadata on how they were made, from the options of the command."""
    if options.nus_wide:
        embeddings, class_names = read_word_vectors(options.names)
        return embeddings, class_names, dict(made_by='NUS-WIDE wordvec_array.pth', rule='as distributed')
    labels = read_labels(options.names)
    texts = list(labels.values())
    if options.text_vectors:
        embeddings = embed_with_text_vectors(texts, options.text_vectors)
        about = dict(made_by=options.text_vectors.name, rule='mean of the words where the whole has no vector')
    elif options.sentence_transformer:
        embeddings = embed_with_sentence_transformer(texts, options.sentence_transformer)
        about = dict(made_by=f'sentence-transformers {options.sentence_transformer.name}', rule='the text alone')
    else:
        embeddings = embed_with_clip(texts, options.clip, options.clip_weights, options.template)
        about = dict(made_by=f'open_clip {options.clip}', rule=options.template)
    about['texts'] = json.dumps({name: text for name, text in labels.items() if text != name})
    return embeddings, list(labels), about


def main(argv: Sequence[str] | None = None) -> None:
    """Make a file of label embeddings from the command line."""
    parser = CommandParser('python -m timm_mldecoder.data.embed', __doc__)
    parser.add_argument('names', type=Path, help='file of class names; for --nus-wide the folder of the dataset')
    parser.add_argument('out', type=Path, help='safetensors file to write')
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument('--text-vectors', type=Path, metavar='FILE', help='word vectors in text form')
    way.add_argument('--sentence-transformer', type=Path, metavar='FOLDER', help='sentence-transformers model on disk')
    way.add_argument('--clip', metavar='MODEL', help='model of open_clip, by name or as local-dir:FOLDER')
    way.add_argument('--nus-wide', action='store_true', help='the word vectors that come with NUS-WIDE')
    parser.add_argument('--clip-weights', metavar='FILE', help='weights of --clip; not for local-dir:')
    parser.add_argument('--template', default=TEMPLATE, help='text around a name, for --clip (default: %(default)s)')
    options = parser.parse_args(argv)
    check(options)
    embeddings, class_names, about = embed(options)
    write_word_embeddings(options.out, embeddings, class_names, **about)
    print(f'wrote {len(class_names)} embeddings of width {embeddings.shape[1]} to {options.out}')


if __name__ == '__main__':
    sys.exit(run_command(main))
