"""Inspection: the statistics of attention weights, the figures and the page."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from conftest import TINY, live_model, run_script, untrained_run
from hypothesis import given, settings
from hypothesis import strategies as st

from gkachat.attention import Attention, SoftmaxAttention
from gkachat.attention.features import rms_norm, rope_table
from gkachat.attention.kernels.reference import visible
from gkachat.checkpoint import load_model
from gkachat.config import GKAConfig
from gkachat.inspection.page import page
from gkachat.inspection.report import markdown, write_inspection
from gkachat.inspection.statistics import (
    Inspection,
    attention_inputs,
    head_statistics,
    inspect_run,
    last_token_weights,
    sigma_history,
)
from gkachat.tokenizer import Tokenizer

T = 200  # longer than the short window, 129
TEXT = "def add(a, b):\n    return a + b\n"


@torch.no_grad()
@pytest.mark.parametrize("attention", ["gka", "gka_conv"])
@pytest.mark.parametrize("include_self", [True, False])
def test_distances_and_sigma_give_the_weights(attention, include_self):
    options = GKAConfig(rope=True, include_self=include_self)
    model = live_model(attention, vocab_size=512, sequence_len=256, gka=options)
    layer, config = model.blocks[0].attn, model.config
    for parameter in layer.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    x_BTC = rms_norm(torch.randn(2, T, config.n_embd))
    idx, rope = torch.randint(0, 512, (2, T)), rope_table(T, config.head_dim)
    found = layer.attention_weights(x_BTC, idx, rope)
    scores = -found.distances.double() / (2 * layer.sigma.double().square()[:, None, None])
    if layer.forgets:
        scores += layer.qkv(layer.inputs(x_BTC), idx, rope).running_sum.double().permute(0, 2, 3, 1)
    keys = visible(T, layer.window, include_self=layer.include_self)
    expected = scores.masked_fill(~keys, -torch.inf).softmax(dim=-1).nan_to_num()  # float64, from the distances
    torch.testing.assert_close(found.weights.double(), expected, atol=1e-5, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["softmax", "gka_conv"])
def test_inspected_weights_are_those_of_every_layer_of_a_model(attention):
    model, outputs = live_model(attention, depth=3, sequence_len=T, attention_x0=True), []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda layer, args, y: outputs.append((args[0], y)))
    ids = torch.randint(64, (T,)).tolist()
    arguments = attention_inputs(model, ids)
    for block, args, (x_BTC, y_BTC) in zip(model.blocks, arguments, outputs, strict=True):
        found = block.attn.attention_weights(*args)
        y_BTHD = (found.weights @ found.values.transpose(1, 2)).transpose(1, 2)
        expected = block.attn.c_proj(block.attn.output(y_BTHD, x_BTC).flatten(2))
        torch.testing.assert_close(expected, y_BTC, rtol=1e-4, atol=1e-5)


def test_statistics_of_known_weights():
    uniform = visible(8, None).float()[None]
    found = head_statistics(uniform / uniform.sum(dim=-1, keepdim=True))
    positions = torch.arange(8.0)
    torch.testing.assert_close(found["effective"][0], positions + 1)
    torch.testing.assert_close(found["distance"][0], positions / 2)
    torch.testing.assert_close(found["self"][0], 1 / (positions + 1))
    assert found["unassigned"].max() < 1e-6
    previous_token = 0.75 * torch.diag(torch.ones(7), -1)[None]
    found = head_statistics(previous_token)
    torch.testing.assert_close(found["effective"][0, 1:], torch.ones(7))
    torch.testing.assert_close(found["distance"][0, 1:], torch.ones(7))
    torch.testing.assert_close(found["unassigned"][0], torch.tensor([1.0] + [0.25] * 7))
    assert found["effective"][0, 0].isnan() and found["distance"][0, 0].isnan()


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_no_more_tokens_are_attended_than_are_visible(n, seed):
    scores = 5 * torch.randn(2, n, n, generator=torch.Generator().manual_seed(seed))
    found = head_statistics(scores.masked_fill(~visible(n, None), -torch.inf).softmax(dim=-1))
    assert (found["effective"] <= torch.arange(1, n + 1) + 1e-4).all() and (found["effective"] >= 1 - 1e-5).all()
    assert (found["distance"] <= torch.arange(n) + 1e-4).all()


@pytest.fixture(scope="module")
def home(corpus_home, tmp_path_factory):
    """A home with one trained run, d2_gka, and untrained runs of one layer."""
    home = tmp_path_factory.mktemp("inspected")
    for name in ("tokenizer", "tokens"):
        (home / name).symlink_to(corpus_home / name)
    result = run_script("base_train", "configs/laptop.toml", *TINY, "--model.attention=gka", home=home)
    assert result.returncode == 0, result.stderr
    tokenizer = Tokenizer.load(next((home / "tokenizer").iterdir()))
    untrained_run(home, "softmax", tokenizer, attention="softmax")
    untrained_run(home, "without_self", tokenizer, attention="gka", gka=GKAConfig(include_self=False))
    return home


@pytest.fixture
def run(home):
    return home / "runs" / "d2_gka"


def test_sigma_history_comes_from_the_log_or_else_from_checkpoints(run, tmp_path):
    logged = sigma_history(run)
    assert list(logged) == [2, 4, 6, 8]
    assert all(len(heads) == 2 for layers in logged.values() for heads in layers)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    saved = sigma_history(tmp_path / "run")
    assert list(saved) == [4, 8]
    torch.testing.assert_close(torch.tensor(list(saved.values())), torch.tensor([logged[4], logged[8]]))


def test_the_table_has_columns_that_apply_and_maps_show_the_chosen_heads(run, home):
    without_self = inspect_run(home / "runs" / "without_self", text=TEXT)
    assert min(without_self.statistics["unassigned"][0]) > 0 and "| sigma |" in markdown(without_self)
    softmax = inspect_run(home / "runs" / "softmax", text=TEXT)
    assert max(softmax.statistics["unassigned"][0]) < 1e-6 and "sigma" not in markdown(softmax)
    inspection = inspect_run(run, text=TEXT, tokens=5, heads=("1.0",))
    assert inspection.maps.keys() == {"1.0"} and inspection.maps["1.0"].shape == (5, 5)
    assert inspection.tokens[0] == "<|bos|>" and len(inspection.tokens) == 5
    torch.testing.assert_close(inspection.maps["1.0"].sum(dim=-1), torch.ones(5))


def test_the_weights_of_the_last_token_are_the_last_row_of_the_maps(run):
    model, tokenizer, _ = load_model(run)
    ids = [tokenizer.bos, *tokenizer.encode(TEXT)][:8]
    weights = last_token_weights(model, ids)
    maps = inspect_run(run, text=TEXT, tokens=8).maps
    assert weights.shape == (2, 2, 8) and len(maps) == 4
    for name, map in maps.items():
        torch.testing.assert_close(weights[tuple(int(i) for i in name.split("."))], map[-1])
    assert not model.blocks[0].attn._forward_pre_hooks  # a server's model does not collect them


def test_the_script_reads_val_documents_and_writes_figures_of_sigma_only_where_there_is_one(run, home):
    result, out = run_script("attention_maps", "d2_gka", "--documents=3", home=home), run / "attention_maps"
    assert result.returncode == 0, result.stderr
    assert "3 val documents, 96 tokens read" in result.stdout and "| 1.1 |" in result.stdout  # contexts of 32
    gka = sorted(path.name for path in out.iterdir())
    assert f"written to {out}: {', '.join(gka)}" in result.stdout and "maps.html" in gka
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in gka if name.endswith(".png"))
    softmax = write_inspection(inspect_run(home / "runs" / "softmax", text=TEXT), out)
    assert set(gka) - set(softmax) == {"sigma.png", "distances.png"}
    assert softmax == sorted(path.name for path in out.iterdir())  # the earlier figures are gone
    tree = json.loads((out / "statistics.json").read_text())
    assert tree["attention"] == "softmax" and not tree["sigma"] and not tree["sigma_history"]


def test_invalid_requests_end_with_one_line(home, tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_bytes(b"")
    for args, message in (
        (["--text", tmp_path / "latin"], "latin: not UTF-8 at byte 3; convert it"),
        (["--text", tmp_path / "empty"], "the text is empty"),
        (["--text", tmp_path / "none"], "No such file"),
        (["--prompt", "x", "--text", tmp_path / "empty"], "expected one of them"),
        (["--prompt", "x", "--heads", "2.0"], "heads: given '2.0', expected LAYER.HEAD with a layer from 0"),
        (["--tokens", "1"], "maps of 1 tokens"),
        (["--step", "3"], "no checkpoint of step 3"),
    ):
        result = run_script("attention_maps", "d2_gka", *args, "--out", tmp_path / "out", home=home)
        assert result.returncode == 1 and result.stderr.count("\n") == 1
        assert result.stderr.startswith("error: ") and message in result.stderr
        assert not (tmp_path / "out").exists()


def test_an_attention_that_cannot_tell_its_weights_is_named(home, monkeypatch):
    monkeypatch.setattr(SoftmaxAttention, "qkv", Attention.qkv)
    with pytest.raises(ValueError, match="'softmax' cannot be inspected: its class SoftmaxAttention defines"):
        inspect_run(home / "runs" / "softmax", text=TEXT)


def inspection_of(tokens, heads=("0.0",), run="a run"):
    """Return an inspection with nothing but maps of these tokens."""
    uniform = visible(len(tokens), None).float()
    maps = {name: uniform / uniform.sum(dim=-1, keepdim=True) for name in heads}
    return Inspection(run, "softmax", 1, "", {}, [], [], [], {}, tokens, maps)


def elements(text):
    """Return the names of all start and end tags of a page."""
    names, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, attrs: names.append(tag)
    parser.handle_endtag = lambda tag: names.append(f"/{tag}")
    parser.feed(text)
    parser.close()
    return names


@given(st.lists(st.text(), min_size=1, max_size=4), st.text() | st.sampled_from(["DATA", "TITLE"]))
def test_tokens_and_run_names_never_break_the_page(tokens, name):
    text = page(inspection_of(tokens, run=name))
    assert elements(text) == elements(page(inspection_of(["a"])))
    data = text.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["tokens"] == tokens


def test_the_page_makes_no_network_request():
    text = page(inspection_of(["a"]))
    assert "default-src 'none'" in text and "src=" not in text and "@import" not in text
    text = text.replace("http://www.w3.org/2000/svg", "")  # a name, not a link
    assert "://" not in text and "url(" not in text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
POINT = """<script>
document.getElementById("head").value = "1.1";
document.getElementById("head").dispatchEvent(new Event("change"));
const at = (i, j) => document.querySelector(`rect[data-i="${i}"][data-j="${j}"]`);
at(3, 1).dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
document.title = document.getElementById("info").textContent;
document.querySelector('#text span[data-i="1"]').dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")
def test_a_browser_draws_the_page_and_describes_what_is_pointed_at(tmp_path):
    tokens = ["<|bos|>", "</script><b>", " x\n", "\u2028é", "\ufffd"]
    text = page(inspection_of(tokens, heads=("0.0", "1.1"), run="<i>run</i>"))
    (tmp_path / "page.html").write_text(text.replace("</body>", POINT + "</body>"))
    result = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0 and "CONSOLE" not in result.stderr, result.stderr
    dom = result.stdout  # after all scripts
    assert dom.count("<rect ") == 15  # 5 tokens, each with those before it
    assert dom.count("<option>") == 2 and "<i>" not in dom and "<b>" not in dom.split("<script")[0]
    assert "<title>3 \u2028é ← 1 &lt;/script&gt;&lt;b&gt; 25.00 %</title>" in dom
    # Pointing at a token marks it and names what it attends to.
    assert 'data-i="1" class="query"' in dom and "1 &lt;/script&gt;&lt;b&gt; ← 0 &lt;|bos|&gt; 50.00 %, 1 " in dom
