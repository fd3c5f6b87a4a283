"""The server's page in headless Chromium: send, stream, stop, compare, inspect, and what it says when things fail."""

import pytest
import torch
from browser import CHROMIUM, browsing
from servers import answer_of, serving, wait_until

from gkachat.data.conversations import render_prompt
from gkachat.inspection.statistics import last_token_weights
from gkachat.serve.api import PAGE

pytest_plugins = ["server_fixtures"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")

HOSTILE = "<img src=x onerror=alert(1)></script>&amp;"
ANSWERS = "[...document.querySelectorAll('.assistant')].map(turn => turn.textContent)"
IDLE = "document.getElementById('stop').disabled"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(browser, server):
    """The page as a visitor finds it, with two models side by side."""
    browser.look(1000, 700, "light")
    browser.open(server.url + "/")
    browser.wait_for("document.querySelectorAll('main section').length == 2")
    yield browser
    assert not browser.errors


def choose(page, **values):
    for name, value in values.items():
        page.evaluate(f"""(() => {{ const field = document.getElementById('{name}'); field.value = {value!r};
            field.dispatchEvent(new Event('change')); }})()""")


def send(page, text):
    page.evaluate("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter")
    page.wait_for("!document.querySelector('[role=alert]') && !!document.querySelector('.user')")


def test_two_models_answer_side_by_side_what_the_engine_answers(page, server):
    choose(page, model0="gka", model1="gka_conv", seed="5", max_tokens="20", top_k="9")
    send(page, HOSTILE)
    page.wait_for(IDLE)
    prompt = render_prompt(server.sessions["gka"].engine.tokenizer, [{"role": "user", "content": HOSTILE}])
    settings = {"seed": 5, "max_tokens": 20, "top_k": 9, "temperature": 0.8}
    expected = [answer_of(server.sessions[run], prompt, **settings)[0] for run in ("gka", "gka_conv")]
    assert page.evaluate(ANSWERS) == expected and expected[0] != expected[1]
    assert page.evaluate("document.querySelector('.user').textContent") == HOSTILE
    assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0
    figures = page.evaluate("[...document.querySelectorAll('.figures')].map(line => line.textContent)")
    assert all("tokens/s" in line and "of 128 in context, cache" in line for line in figures)
    send(page, "and?")  # the conversation goes on, cut to the context
    page.wait_for(f"{IDLE} && {ANSWERS}.length == 4")
    page.evaluate("document.getElementById('clear').click()")
    assert page.evaluate(ANSWERS) == []


def test_a_token_shows_the_weights_that_its_heads_gave_by_keyboard_alone(page, server):
    choose(page, model0="softmax", model1="", seed="1", max_tokens="12")
    send(page, "def f(")
    page.wait_for(f"{IDLE} && document.querySelectorAll('.token').length > 2")
    page.press("Tab", shift=True)  # from the message to the newest token
    page.press("ArrowLeft")
    at = page.evaluate("document.activeElement.at")
    page.press("Enter")
    page.wait_for("document.getElementById('context').childElementCount")
    session = server.sessions["softmax"]
    tokenizer = session.engine.tokenizer
    prompt = [tokenizer.bos, *tokenizer.encode("def f(")]
    _, ids = answer_of(session, prompt, seed=1, max_tokens=12, top_k=50, temperature=0.8)
    weights = last_token_weights(session.engine.model, [*prompt, *ids[:at]])
    choose(page, head="0.1")
    shown = page.evaluate("[...document.querySelectorAll('#context span')].map(token => parseFloat(token.title) / 100)")
    torch.testing.assert_close(torch.tensor(shown), weights[0, 1], atol=1e-4, rtol=0)
    assert page.evaluate("document.getElementById('largest').textContent").startswith("most weight on ")
    page.press("Escape")
    assert page.evaluate("document.getElementById('why').hidden")


@pytest.mark.parametrize("how", ["click", "Escape"])
def test_stop_ends_an_answer_and_the_next_follows(page, server, slow, how):
    choose(page, model0="gka", model1="gka_conv", temperature="0", max_tokens="120")
    send(page, "x")
    page.wait_for(f"{ANSWERS}.length == 2 && {ANSWERS}.every(text => text.length > 1)")  # streams
    assert not page.evaluate(IDLE)
    page.press("Escape") if how == "Escape" else page.evaluate("document.getElementById('stop').click()")
    page.wait_for(IDLE)
    wait_until(lambda: server.batcher.count() == 0)
    prompt = render_prompt(server.sessions["gka"].engine.tokenizer, [{"role": "user", "content": "x"}])
    for run, shown in zip(("gka", "gka_conv"), page.evaluate(ANSWERS), strict=True):
        assert len(shown) < len(answer_of(server.sessions[run], prompt, max_tokens=120, temperature=0)[0])
    assert page.evaluate("document.querySelectorAll('[role=alert]').length") == 0
    send(page, "y")
    page.wait_for(f"{ANSWERS}.length == 4")
    page.press("Escape")
    page.wait_for(IDLE)


def test_the_page_fits_a_phone_and_follows_the_systems_colours(page):
    backgrounds = set()
    for scheme in ("light", "dark"):
        page.look(360, 640, scheme)
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("document.getElementById('stop').getBoundingClientRect().bottom") <= 640
        form, main = (
            page.evaluate(f"document.querySelector('{it}').getBoundingClientRect().toJSON()") for it in ("form", "main")
        )
        assert main["bottom"] <= form["top"]
    assert len(backgrounds) == 2


def test_the_page_says_what_failed(browser, sessions, slow):
    with serving(sessions, api_key="secret") as server:
        browser.open(server.url + "/")
        alert = "document.querySelector('[role=alert]')?.textContent"
        assert "given no valid API key" in browser.wait_for(alert)
        choose(browser, key="secret")
        browser.wait_for("document.querySelectorAll('main section h2').length == 2")
        choose(browser, model0="gka", model1="", temperature="0", max_tokens="120")
        browser.errors.clear()  # Chromium logs the status 401 and lost connections
        send(browser, "x")
        browser.wait_for(f"{ANSWERS}[0]?.length > 1")
        server.batcher.drain(0)
        assert "the server stopped before the answer was complete" in browser.wait_for(alert)
    choose(browser, model0="gka_conv")
    browser.evaluate("document.getElementById('prompt').focus()")
    browser.type("y")
    browser.press("Enter")
    assert "cannot be reached. Has it stopped?" in browser.wait_for(alert)
    assert browser.evaluate(IDLE) and not [e for e in browser.errors if "exceptionDetails" in e]
    browser.errors.clear()


def test_the_page_is_one_file_that_asks_nothing_of_the_network():
    text = PAGE.read_text()
    assert "default-src 'none'" in text and "src=" not in text and "@import" not in text
    assert "://" not in text and "url(" not in text and "innerHTML" not in text
