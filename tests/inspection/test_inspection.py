"""Looking inside: a layer's weights against its own forward, what is counted of them, the pictures and the page."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
import tyro
from conftest import TINY, call, untrained_run
from hypothesis import given, settings
from hypothesis import strategies as st

from gkachat.attention.features import rms_norm, rope_table
from gkachat.attention.fused import visible
from gkachat.attention.layers import ATTENTION
from gkachat.config import GKAConfig, GPTConfig, PlusConfig
from gkachat.inspection.report import Inspection, figures, inspect_run, markdown, page, sigma_history, write_inspection
from gkachat.tokenizer import Tokenizer
from scripts import cli
from scripts.attention_maps import main

SHAPE = {"depth": 2, "vocab_size": 512, "sequence_len": 256, "n_embd": 32, "head_dim": 16, "window_pattern": "SL"}
BARE = {"conv_query": False, "conv_key": False}
WHOLE = {"neighbour": True, "token_bandwidth": True, "key_weight": True}
VARIANTS = {
    "softmax": {"attention": "softmax"},
    "softmax, convolved": {"attention": "softmax", "short_conv": True},
    "gka": {"attention": "gka"},
    "gka, rope": {"attention": "gka", "gka": GKAConfig(rope=True)},
    "gka, normalised": {"attention": "gka", "gka": GKAConfig(normalize=True, rope=True)},
    "gka, without self": {"attention": "gka", "gka": GKAConfig(include_self=False)},
    "gka_plus": {"attention": "gka_plus"},
    "gka_plus, not normalised": {"attention": "gka_plus", "plus": PlusConfig(normalize=False, rope=False)},
    "gka_plus, whole": {"attention": "gka_plus", "plus": PlusConfig(**WHOLE)},
    "gka_plus, bare": {"attention": "gka_plus", "plus": PlusConfig(**BARE)},
    "gka_plus, bare, not normalised": {"attention": "gka_plus", "plus": PlusConfig(**BARE, normalize=False)},
}
KERNELS = [name for name in VARIANTS if "bare" in name or name.split(",")[0] == "gka"]
T = 200  # longer than the short window, 128


@pytest.fixture(params=[(name, index) for name in VARIANTS for index in (0, 1)], ids=str)
def layer(request):
    """One with all its weights drawn anew, a block input, tokens and rotations."""
    name, index = request.param
    config = GPTConfig(**SHAPE, **VARIANTS[name])
    torch.manual_seed(0)
    layer = ATTENTION[config.attention](config, index)
    layer.choose_backend(torch.device("cpu"), torch.float32)
    layer.init_weights()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x_BTC = rms_norm(torch.randn(2, T, config.n_embd))
    return layer, (x_BTC, torch.randint(0, 512, (2, T)), rope_table(T, config.head_dim))


@torch.no_grad()
def test_the_weights_of_the_values_are_what_the_layer_computes(layer):
    layer, given = layer
    look = layer.look(*given)
    y_BTHD = torch.einsum("bhts,bshd->bthd", look.weights, look.values)
    # Sums over 200 float32 products, in another order.
    torch.testing.assert_close(layer.c_proj(y_BTHD.flatten(2)), layer(*given), atol=1e-5, rtol=1e-4)
    assert look.weights.dtype == torch.float32 and look.weights.min() >= 0
    assert look.weights.sum(dim=-1).max() <= 1 + 1e-5
    assert look.weights[..., ~visible(T, layer.window)].abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("layer", [(name, i) for name in KERNELS for i in (0, 1)], indirect=True, ids=str)
def test_sigma_and_the_distances_give_the_weights_where_nothing_else_has_a_say(layer):
    layer, given = layer
    look = layer.look(*given)
    keys = visible(T, layer.window, include_self=look.weights.diagonal(dim1=-2, dim2=-1).max() > 0)
    kernel = (-look.distances.double() / (2 * layer.sigma.double().square()[:, None, None])).exp() * keys
    expected = (kernel / kernel.sum(dim=-1, keepdim=True)).nan_to_num()  # float64, from the distances
    torch.testing.assert_close(look.weights.double(), expected, atol=1e-5, rtol=1e-3)


def test_what_is_counted_of_weights_that_are_known():
    uniform = visible(8, None).float()[None]
    found = figures(uniform / uniform.sum(dim=-1, keepdim=True))
    at = torch.arange(8.0)
    torch.testing.assert_close(found["effective"][0], at + 1)
    torch.testing.assert_close(found["distance"][0], at / 2)
    torch.testing.assert_close(found["self"][0], 1 / (at + 1))
    assert found["nothing"].max() < 1e-6
    before = 0.75 * torch.diag(torch.ones(7), -1)[None]
    found = figures(before)
    torch.testing.assert_close(found["effective"][0, 1:], torch.ones(7))
    torch.testing.assert_close(found["distance"][0, 1:], torch.ones(7))
    torch.testing.assert_close(found["nothing"][0], torch.tensor([1.0] + [0.25] * 7))
    assert found["effective"][0, 0].isnan() and found["distance"][0, 0].isnan()


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_no_more_tokens_are_attended_than_there_are(n, seed):
    scores = 5 * torch.randn(2, n, n, generator=torch.Generator().manual_seed(seed))
    found = figures(scores.masked_fill(~visible(n, None), -torch.inf).softmax(dim=-1))
    assert (found["effective"] <= torch.arange(1, n + 1) + 1e-4).all() and (found["effective"] >= 1 - 1e-5).all()
    assert (found["distance"] <= torch.arange(n) + 1e-4).all()


@pytest.fixture(scope="module")
def trained(corpus_home, tmp_path_factory):
    """A run that was trained, and others of one layer as they start."""
    home = tmp_path_factory.mktemp("inspected")
    for name in ("tokenizer", "tokens"):
        (home / name).symlink_to(corpus_home / name)
    result = call("base_train", "configs/laptop.toml", *TINY, "--model.attention=gka", home=home)
    assert result.returncode == 0, result.stderr
    tokenizer = Tokenizer.load(next((home / "tokenizer").iterdir()))
    untrained_run(home, "softmax", tokenizer, attention="softmax")
    untrained_run(home, "others_alone", tokenizer, attention="gka", gka=GKAConfig(include_self=False))
    return home


@pytest.fixture
def run(trained):
    return trained / "runs" / "d2_gka"


def test_bandwidths_over_training_come_from_the_log_or_from_checkpoints(run, tmp_path):
    labels, logged = sigma_history(run)
    assert labels == ["head 0", "head 1"] and list(logged) == [2, 4, 6, 8]
    assert all(len(layer) == 2 for sigma in logged.values() for layer in sigma)
    shutil.copytree(run, tmp_path / "run")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("sigma_by_head", None)  # as runs were logged before
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    labels, old = sigma_history(tmp_path / "run")
    assert labels == ["least", "median", "largest"] and list(old) == [2, 4, 6, 8]
    assert all(old[s][i][0] == min(logged[s][i]) and old[s][i][2] == max(logged[s][i]) for s in old for i in (0, 1))
    early = [record for record in records if "sigma" not in record]  # of a run that logged no step yet
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in early))
    labels, saved = sigma_history(tmp_path / "run")
    assert labels == ["head 0", "head 1"] and list(saved) == [4, 8]
    torch.testing.assert_close(torch.tensor(list(saved.values())), torch.tensor([logged[4], logged[8]]))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert sigma_history(tmp_path / "run") == (labels, saved)


def test_pictures_of_sigma_are_drawn_where_there_is_one(run, trained, tmp_path):
    gka = write_inspection(inspect_run(run, text="def add(a, b):\n    return a + b\n"), tmp_path)
    assert {"sigma.png", "distances.png"} < set(gka) == {path.name for path in tmp_path.iterdir()}
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in gka if name.endswith(".png"))
    softmax = write_inspection(inspect_run(trained / "runs" / "softmax", text="def add(a, b):"), tmp_path)
    assert set(gka) - set(softmax) == {"sigma.png", "distances.png"}
    assert set(softmax) == {path.name for path in tmp_path.iterdir()}  # nothing is left of the run before
    tree = json.loads((tmp_path / "inspection.json").read_text())
    assert tree["attention"] == "softmax" and not tree["sigma"] and not tree["history"][1]


def test_maps_are_of_the_chosen_heads_and_of_the_first_tokens(run):
    inspection = inspect_run(run, text="def add(a, b): return a", tokens=5, heads=("1.0",))
    assert list(inspection.maps) == ["1.0"] and inspection.maps["1.0"].shape == (5, 5)
    assert inspection.tokens[0] == "<|bos|>" and len(inspection.tokens) == 5
    torch.testing.assert_close(inspection.maps["1.0"].sum(dim=-1), torch.ones(5))


def test_the_share_that_goes_to_no_token_is_told(trained):
    told = markdown(inspect_run(trained / "runs" / "others_alone", text="def add(a, b): return a"))
    assert "| nothing |" in told and "| sigma |" in told
    inspection = inspect_run(trained / "runs" / "softmax", text="def add(a, b): return a")
    assert "nothing" not in markdown(inspection) and "sigma" not in markdown(inspection)


def test_the_script_reads_val_documents_prints_a_table_and_says_what_it_wrote(run, trained):
    result = call("inspect", "d2_gka", "--documents=3", home=trained)
    assert result.returncode == 0, result.stderr
    assert "3 val documents, 96 tokens read" in result.stdout and "| 1.1 |" in result.stdout  # contexts of 32
    assert f"written to {run / 'inspect'}: distances.png" in result.stdout
    assert (run / "inspect" / "maps.html").exists()


def test_what_cannot_be_inspected_is_one_line_and_a_failing_exit(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GKACHAT_HOME", str(trained))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_bytes(b"")
    for args, told in (
        (["d9"], "no run 'd9'"),
        (["d2_gka", "--text", tmp_path / "latin"], "is not UTF-8 (unexpected end of data at byte 3)"),
        (["d2_gka", "--text", tmp_path / "empty"], "the text is empty"),
        (["d2_gka", "--text", tmp_path / "none"], "No such file"),
        (["d2_gka", "--prompt", "x", "--text", tmp_path / "empty"], "expected one of them"),
        (["d2_gka", "--prompt", "x", "--heads", "2.0"], "heads: given '2.0', expected LAYER.HEAD with a layer from 0"),
        (["d2_gka", "--tokens", "1"], "maps of 1 tokens"),
        (["d2_gka", "--step", "3"], "no checkpoint of step 3"),
    ):
        with pytest.raises(SystemExit, match="1"):
            cli.run(lambda args=args: tyro.cli(main, args=[*map(str, args), "--out", str(tmp_path / "out")]))
        error = capsys.readouterr().err
        assert told in error and error.startswith("error: ") and error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def shown(tokens, heads=("0.0",), run="a run"):
    """An inspection with nothing but maps of these tokens."""
    n = len(tokens)
    weights = visible(n, None).float()
    maps = {name: weights / weights.sum(dim=-1, keepdim=True) for name in heads}
    return Inspection(run, "softmax", 1, "", {}, [], [], [], ([], {}), tokens, maps)


class Elements(HTMLParser):
    """Every element's name, and the text of that with id="data"."""

    def __init__(self, text):
        super().__init__()
        self.names, self.data, self.open = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag != "meta":
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][1].get("id") == "data":
            self.data += data


PLAIN = Elements(page(shown(["a"])))


@given(st.lists(st.text(), min_size=1, max_size=4), st.text())
def test_any_token_and_any_name_make_a_page_whose_data_are_read_back(tokens, name):
    found = Elements(page(shown(tokens, run=name)))
    assert found.names == PLAIN.names and not found.open
    assert json.loads(found.data)["tokens"] == tokens


def test_the_page_asks_nothing_of_any_network():
    text = page(shown(["a"]))
    assert "default-src 'none'" in text and "src=" not in text and "@import" not in text
    text = text.replace("http://www.w3.org/2000/svg", "")  # a name, not a link
    assert "://" not in text and "url(" not in text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")
POINT = """<script>
document.getElementById("head").value = "1.1";
document.getElementById("head").dispatchEvent(new Event("change"));
const at = (i, j) => document.querySelector(`rect[data-i="${i}"][data-j="${j}"]`);
at(3, 1).dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
document.title = document.getElementById("info").textContent;
document.querySelector('#text span[data-i="1"]').dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
</script>"""


def browsed(directory):
    """What a browser makes of page.html there: its DOM after all scripts, and what it has to say."""
    return subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory / 'profile'}",
         "--enable-logging=stderr", "--dump-dom", (directory / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@needs_browser
def test_a_browser_draws_the_page_and_tells_what_is_pointed_at(tmp_path):
    tokens = ["<|bos|>", "</script><b>", " x\n", "\u2028é", "\ufffd"]
    text = page(shown(tokens, heads=("0.0", "1.1"), run="<i>run</i>"))
    (tmp_path / "page.html").write_text(text.replace("</body>", POINT + "</body>"))
    result = browsed(tmp_path)
    assert result.returncode == 0 and "CONSOLE" not in result.stderr, result.stderr
    dom = result.stdout
    assert dom.count("<rect ") == 15  # of 5 tokens, each with those before it
    assert dom.count("<option>") == 2 and "<i>" not in dom and "<b>" not in dom.split("<script")[0]
    assert "<title>3 \u2028é ← 1 &lt;/script&gt;&lt;b&gt; 25.00 %</title>" in dom
    # Then at a word: it is marked, and what it looks at is named.
    assert 'data-i="1" class="query"' in dom and "1 &lt;/script&gt;&lt;b&gt; ← 0 &lt;|bos|&gt; 50.00 %, 1 " in dom


@needs_browser
def test_the_browser_test_would_see_an_error(tmp_path):
    (tmp_path / "page.html").write_text(page(shown(["a"])).replace("draw();\n</script>", "drawn();\n</script>"))
    result = browsed(tmp_path)
    assert "CONSOLE" in result.stderr and "<rect " not in result.stdout
