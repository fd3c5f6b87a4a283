"""Decoding: greedy, sampled, streamed."""

import pytest
import torch

from gkachat.engine import Engine, sample
from gkachat.gpt import GPT, GPTConfig
from gkachat.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["def add(a, b):\n    return a + b  # é 漢\n"] * 3, 512)


@pytest.fixture(params=["softmax", "gka"])
def engine(request):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(depth=2, attention=request.param, vocab_size=512, sequence_len=24, n_embd=32, head_dim=16)
    ).eval()
    for name, p in model.named_parameters():
        if name.endswith(("c_proj.weight", "lm_head.weight")):
            torch.nn.init.normal_(p, std=0.3)
    return Engine(model, TOKENIZER)


def greedy(engine, tokens, n):
    """The definition: the argmax of the logits at the last position, again and again."""
    tokens = [TOKENIZER.bos, *tokens]
    for _ in range(n):
        window = [TOKENIZER.bos, *tokens[1:][-23:]]
        tokens.append(int(engine.model(torch.tensor([window]))[0, -1, : TOKENIZER.vocab_size].argmax()))
    return tokens[-n:]


def test_temperature_zero_is_greedy_also_beyond_the_sequence(engine):
    prompt = TOKENIZER.encode("def add")
    got = list(engine.generate(prompt, max_tokens=40, temperature=0))
    expected = greedy(engine, prompt, 40)
    stop = expected.index(TOKENIZER.bos) if TOKENIZER.bos in expected else 40
    assert got == expected[:stop]


def test_the_seed_decides_the_sample(engine):
    prompt = TOKENIZER.encode("def")
    a, b, c = (list(engine.generate(prompt, max_tokens=20, seed=seed)) for seed in (1, 1, 2))
    assert a == b != c


def test_an_empty_prompt_and_no_tokens_are_fine(engine):
    assert len(list(engine.generate([], max_tokens=3))) <= 3
    assert list(engine.generate([5], max_tokens=0)) == []


def test_generation_ends_where_a_new_document_would_start(engine):
    with torch.no_grad():
        engine.model.lm_head.weight.zero_()
        engine.model.lm_head.weight[TOKENIZER.bos] = 0
    rigged = torch.full((1, 1, 512), -1.0)
    rigged[..., TOKENIZER.bos] = 1.0
    engine.model.forward = lambda idx: rigged.expand(1, idx.size(1), 512)
    assert list(engine.generate([5], max_tokens=9, temperature=0)) == []


@pytest.mark.parametrize(
    "setting", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_tokens": -1}]
)
def test_settings_out_of_range_are_named(engine, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}: given"):
        list(engine.generate([1], **setting))


def counts(n=4000, **settings):
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
    drawn = [sample(logits, generator=generator, **options) for _ in range(n)]
    return [drawn.count(i) / n for i in range(4)]


def test_samples_follow_the_probabilities():
    assert counts() == pytest.approx([0.5, 0.2, 0.2, 0.1], abs=0.03)
    assert counts(temperature=0.5) == pytest.approx([25 / 34, 4 / 34, 4 / 34, 1 / 34], abs=0.03)


def test_top_k_keeps_the_likeliest():
    assert counts(top_k=1) == [1, 0, 0, 0]
    assert counts(top_k=9) == pytest.approx([0.5, 0.2, 0.2, 0.1], abs=0.03)


def test_top_p_keeps_what_reaches_the_probability_and_at_least_one():
    assert counts(top_p=0.01) == [1, 0, 0, 0]
    kept = counts(top_p=0.9)
    assert kept[3] == 0 and kept[0] == pytest.approx(5 / 9, abs=0.03)
    assert counts(top_p=1.0)[3] > 0


def test_characters_are_streamed_whole(engine):
    text = "é 漢字 🙂"
    ids = [TOKENIZER.encoding.encode_single_token(bytes([b])) for b in text.encode()]
    pieces = list(engine.stream(ids))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert "".join(engine.stream(ids[:-1])).endswith("\ufffd")
