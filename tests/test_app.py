"""The page in the browser: on its server, and in a real headless Chromium."""

import argparse
import json
import os
import shutil
import time

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from timm_mldecoder import app
from timm_mldecoder.checkpoint.folders import save_folder
from timm_mldecoder.data.word_embeddings import read_word_embeddings, write_word_embeddings
from timm_mldecoder.modeling.classes import Classes

HEAD = dict(decoder_embedding=32, num_heads=4, dim_feedforward=64)
NAMES = ['sky', 'zebra', '<script>document.title = "taken over"</script> ${1+1} {{names}}']
MORE = ['tram', 'lamp']
MAX_SIZE = 1  # MB
CHROMIUM = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking'
CHROMIUM += ' --disable-component-update --disable-sync --window-size=1280,900'


def save(folder, model, names, **settings):
    config = {'input_size': (3, 64, 64), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'crop_pct': 1.0}
    save_folder(model.eval(), folder, class_names=names, data_config=config, **settings)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Two models: with text queries for several labels, and a linear one for a single label."""
    folder = tmp_path_factory.mktemp('app')
    torch.manual_seed(0)
    write_word_embeddings(folder / 'words.safetensors', torch.randn(2, 6), MORE)
    words = dict(word_embeddings=torch.randn(3, 6), class_names=NAMES)
    model = timm.create_model('test_resnet', num_classes=3, ml_decoder={**HEAD, **words})
    with torch.no_grad():  # scores that differ
        model.get_classifier().group_fc.weight.mul_(8)
    save(folder / 'text', model, NAMES, task='multilabel', thresholds=dict(zip(NAMES, (0.2, 0.5, 0.6), strict=True)))
    save(folder / 'linear', timm.create_model('test_resnet', num_classes=2), ['cat', 'dog'])
    pixels = torch.randint(256, (90, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(folder / 'image.png')
    (folder / 'text.jpg').write_text('not an image')
    with (folder / 'big.png').open('wb') as file:
        file.truncate(100 * 2**20)
    return folder


@pytest.fixture(scope='module')
def models(folder):
    arguments = argparse.Namespace(device='cpu', task=None)
    more = Classes(*read_word_embeddings(folder / 'words.safetensors'))
    return [app.load(str(folder / name), arguments, more) for name in ('text', 'linear')]


@pytest.fixture(scope='module')
def address(models):
    page = app.build(models, MAX_SIZE)
    arguments = argparse.Namespace(host='127.0.0.1', port=None, max_size=MAX_SIZE)
    yield app.launch(page, arguments, block=False)
    page.close()


def expected(folder, name, classes=None):
    model = timm.create_model(f'local-dir:{folder / name}', pretrained=True).eval()
    if classes:
        model.get_classifier().set_word_embeddings(*read_word_embeddings(folder / 'words.safetensors', classes))
    transform = create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        logits = model(transform(Image.open(folder / 'image.png'))[None])[0]
    return (logits.sigmoid() if name == 'text' else logits.softmax(0)).tolist()


def test_scores_are_those_of_the_models_and_typed_classes_replace_them_for_one_image_only(folder, models):
    text, linear = models
    with Image.open(folder / 'image.png') as image:
        assert text.score(image).scores == pytest.approx(expected(folder, 'text'), rel=1e-5)
        assert linear.score(image, 'tram').scores == pytest.approx(expected(folder, 'linear'), rel=1e-5)
        found = text.score(image, 'tram,  lamp\ntram')
        assert found.names == MORE and found.scores == pytest.approx(expected(folder, 'text', MORE), rel=1e-5)
        assert text.attention(image, MORE, 1).size == (app.SIDE, app.SIDE)
        assert text.score(image).names == NAMES and len(text.loaded.model.get_classifier().class_names) == 3
        with pytest.raises(ValueError, match='balloon'):
            text.score(image, 'tram, balloon')
    assert set(text.vocabulary) == {*NAMES, *MORE} and not linear.vocabulary


def test_the_threshold_moves_the_list_and_names_are_escaped(models):
    found = app.Scores(NAMES, [0.1, 0.9, 0.5])
    lists = {threshold: models[0].rows(found, threshold) for threshold in (0, 0.3, 0.5, 0.95)}
    assert [text.count('<button') for text in lists.values()] == [3, 2, 2, 0]
    assert lists[0].index('zebra') < lists[0].index('&lt;script&gt;') < lists[0].index('sky')
    assert '<script' not in ''.join(lists.values()) and 'zebra' in lists[0.95]


def test_names_of_models_and_of_uploads_stay_text(models, tmp_path):
    shown = app.Shown('<b>x</b>/../"y"\n', models[0].loaded, None)
    assert '<b>' not in shown.about() and '&quot;y&quot;' in shown.about()
    (tmp_path / 'x.jpg').write_text('not an image')
    upload = argparse.Namespace(path=str(tmp_path / 'x.jpg'), orig_name='../../<script>=1.jpg')
    message = app._problem(app._read_upload(upload))
    assert '<script' not in message and '../../&lt;script&gt;=1.jpg' in message
    assert [path.name for path in tmp_path.iterdir()] == ['x.jpg']


def test_the_server_answers_and_refuses(folder, address):
    gradio_client = pytest.importorskip('gradio_client')
    import httpx

    client = gradio_client.Client(address, verbose=False)
    image = gradio_client.handle_file(str(folder / 'image.png'))
    lists = [part for part in client.predict(image, '', 0.0, False, api_name='/predict') if isinstance(part, str)]
    assert [text.count('<button') for text in lists] == [3, 2]
    assert all(f'<b>{score:.3f}</b>' in lists[0] for score in expected(folder, 'text'))
    renamed = gradio_client.handle_file(str(folder / 'text.jpg'))
    assert 'text.jpg' in str(client.predict(renamed, '', 0.0, False, api_name='/predict'))
    with (folder / 'big.png').open('rb') as file:
        answer = httpx.post(f'{address}gradio_api/upload', files={'files': file}, timeout=60)
    assert answer.status_code == 413
    answer = httpx.get(address)
    assert "default-src 'self'" in answer.headers['content-security-policy']
    config = httpx.get(f'{address}config').json()
    assert config['analytics_enabled'] is False and os.environ['GRADIO_ANALYTICS_ENABLED'] == 'False'
    assert address.startswith('http://127.0.0.1:')


@pytest.mark.parametrize('flags, message', [
    ('nothing', 'nothing'),
    ('linear --word-embeddings words.safetensors', '--word-embeddings'),
    ('words.safetensors', 'words.safetensors'),
    ('linear --device cuda:99', '--device'),
    ('linear --device cpu --host 203.0.113.9', '--host 203.0.113.9'),
    ('linear --device cpu --port 70000', '--port 70000'),
])  # fmt: skip
def test_mistakes_are_value_errors(folder, flags, message, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        app.main(flags.split())


def test_without_a_threshold_the_list_has_the_labels_that_predict_gives(models):
    text, linear = models
    found = app.Scores(NAMES, [0.3, 0.4, 0.55])  # tuned: 0.2, 0.5, 0.6
    assert text.rows(found, None).count('<button') == 1 and 'sky' in text.rows(found, None)
    given = text.loaded.labels(torch.tensor([found.scores]))[0]
    assert [label.name for label in given] == ['sky']
    assert linear.rows(app.Scores(['cat', 'dog'], [0.96, 0.04]), None).count('<button') == 1


@pytest.fixture
def browser(tmp_path):
    """A Chromium that logs its requests; a machine of CI that has one must have all that drives it."""
    binary, driver = shutil.which('chromium'), shutil.which('chromedriver')
    try:
        from selenium import webdriver
    except ImportError:
        webdriver = None
    if not (binary and driver and webdriver):
        give_up = pytest.fail if binary and os.environ.get('CI') else pytest.skip
        give_up("the browser test needs: apt-get install chromium chromium-driver; pip install 'timm-mldecoder[test]'")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in [*CHROMIUM.split(), f'--user-data-dir={tmp_path / "profile"}']:
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'performance': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driver
    driver.quit()


def wait(condition, seconds=60):
    """Return what `condition` returns once it is true; a page may change while it is read."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    while True:
        try:
            if found := condition():
                return found
        except WebDriverException:
            pass  # the element has just been replaced
        assert time.monotonic() < end, 'the page does not get there'
        time.sleep(0.1)


def test_the_page_in_a_browser(browser, folder, address, tmp_path):
    from selenium.webdriver.common.keys import Keys

    def all_of(selector):
        return browser.find_elements('css selector', selector)

    def one(selector):
        return wait(lambda: all_of(selector))[0]

    def labels(number=0):
        return [span.text for span in all_of(f'#labels-{number} button span')]

    def set_threshold(value):
        one('#threshold input[type=number]').send_keys(Keys.CONTROL, 'a')
        one('#threshold input[type=number]').send_keys(value, Keys.TAB)

    def upload(name):
        one('#image input[type=file]').send_keys(str(folder / name))

    browser.get(address)
    set_threshold('0')
    upload('image.png')
    scores = expected(folder, 'text')
    order = sorted(range(3), key=lambda index: -scores[index])
    wait(lambda: len(labels()) == 3 and len(labels(1)) == 2)
    assert labels() == [NAMES[index] for index in order], 'names are text, the likeliest first'

    middle = (scores[order[0]] + scores[order[1]]) / 2
    assert scores[order[0]] - scores[order[1]] > 0.02, 'the slider has steps of 0.01'
    set_threshold(f'{middle:.2f}')
    wait(lambda: labels() == [NAMES[order[0]]])
    set_threshold('0')
    wait(lambda: len(labels()) == 3)

    one('#labels-0 button').click()
    wait(lambda: all_of('#attention-0 img') and all_of('#labels-0 button[aria-pressed=true]'))
    browser.save_screenshot(str(tmp_path / 'page.png'))
    assert not all_of('#attention-1 img'), 'a linear classifier has no attention'

    one('#classes textarea').send_keys('lamp, tram')
    one('#score button, button#score').click()
    wait(lambda: sorted(labels()) == ['lamp', 'tram'])
    one('#classes textarea').send_keys(', balloon')
    one('#score button, button#score').click()
    assert 'balloon' in wait(lambda: all_of('#labels-0 [role=alert]'))[0].text

    for name, message in [('big.png', 'maximum allowed size'), ('text.jpg', 'text.jpg is not an image')]:
        browser.get(address)
        upload(name)
        wait(lambda message=message: message in one('body').text)

    assert 'taken over' not in browser.title
    requests = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
    sent = [m['params']['request']['url'] for m in requests if m['method'] == 'Network.requestWillBeSent']
    outside = [url for url in sent if url.startswith(('http', 'ws')) and not url.startswith(address)]
    assert sent and not outside, 'nothing is loaded from elsewhere'
