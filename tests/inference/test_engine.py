"""Decoding: greedy, sampled, streamed."""

import pytest
import torch

from gkachat.inference.engine import Engine, Request, Sampling
from gkachat.inference.sampling import plan_of, settings_of
from gkachat.inference.sampling import sample as draw
from gkachat.model.gpt import GPT, GPTConfig
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
        tokens.append(int(engine.model(torch.tensor([tokens]))[0, -1, : TOKENIZER.vocab_size].argmax()))
    return tokens[-n:]


def upto_bos(tokens):
    return tokens[: tokens.index(TOKENIZER.bos)] if TOKENIZER.bos in tokens else tokens


def answers(engine, requests, **options):
    """Tokens, text and end of each request."""
    tokens, texts, ends = ([[] for _ in requests] for _ in range(3))
    for piece in engine.run(requests, **options):
        tokens[piece.request] += [] if piece.token is None else [piece.token]
        texts[piece.request].append(piece.text)
        ends[piece.request] += [piece.finished] if piece.finished else []
    assert all(len(end) == 1 for end in ends)
    return tokens, ["".join(t) for t in texts], [end[0] for end in ends]


PROMPTS = [TOKENIZER.encode(text) for text in ("def add", "", "return", "a, b", "é 漢", "    ", "def", "#")]


def test_temperature_zero_is_greedy_and_ends_with_the_sequence(engine):
    for prompt in PROMPTS[:3]:
        got = list(engine.generate(prompt, max_tokens=100, temperature=0))
        assert got == upto_bos(greedy(engine, prompt, 24 - len(prompt)))


def test_a_sequence_that_is_full_is_told(engine):
    requests = [Request(PROMPTS[0], Sampling(max_tokens=n, temperature=0)) for n in (0, 2, 100)]
    assert answers(engine, requests)[2] in (["max_tokens", "max_tokens", "sequence_len"], ["max_tokens"] * 2 + ["bos"])
    with pytest.raises(ValueError, match="the prompt: given 25 tokens, expected at most sequence_len 24"):
        list(engine.generate([5] * 24))


def test_sliding_has_no_end(engine):
    sampled = [list(engine.generate([5] * 40, max_tokens=60, seed=seed, slide=True)) for seed in range(20)]
    assert max(map(len, sampled)) > 24
    for seed in range(3):
        short, long = (list(engine.generate(PROMPTS[0], max_tokens=n, seed=seed, slide=True)) for n in (10, 60))
        assert long[:10] == short == list(engine.generate(PROMPTS[0], max_tokens=10, seed=seed))


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_what_else_is_in_the_batch_makes_no_difference(engine, rows, temperature):
    requests = [
        Request(prompt, Sampling(max_tokens=3 + 2 * i, temperature=temperature, seed=i, top_k=40))
        for i, prompt in enumerate(PROMPTS)
    ]
    alone = [list(engine.generate(r.tokens, **vars(r.sampling))) for r in requests]
    assert answers(engine, requests, rows=rows)[0] == alone


def test_a_step_whose_shapes_stay_gives_the_same(engine, monkeypatch):
    """As a recorded one does; what compiling is worth beside that is the next test's."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    settings = [Sampling(max_tokens=2 + 3 * i, seed=i, top_k=40, repetition_penalty=1.0 + 0.1 * i) for i in range(8)]
    requests = [Request(prompt, s) for prompt, s in zip(PROMPTS, settings, strict=True)]
    fixed = Engine(engine.model, TOKENIZER, compile=True)
    assert answers(fixed, requests, rows=3) == answers(engine, requests, rows=3)


def test_a_compiled_step_gives_the_same():
    torch.manual_seed(0)
    config = GPTConfig(depth=1, attention="gka", vocab_size=512, sequence_len=300, n_embd=32, head_dim=16)
    model = GPT(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    requests = [
        Request(prompt, Sampling(max_tokens=290 - 40 * i, seed=i, top_p=0.9, logprobs=True))
        for i, prompt in enumerate(PROMPTS)
    ]
    compiled, plain = (answers(Engine(model, TOKENIZER, compile=c), requests, rows=3) for c in (True, False))
    assert compiled == plain


def test_samples_of_one_prompt_share_it_and_are_those_of_their_seeds(engine):
    prompt = PROMPTS[0]
    got = engine.samples(prompt, 5, rows=3, max_tokens=9, seed=7)
    assert got == [list(engine.generate(prompt, max_tokens=9, seed=7 + i)) for i in range(5)]
    assert len({tuple(tokens) for tokens in got}) > 1
    assert len(engine.samples([], 2, max_tokens=3)) == 2


def test_requests_go_on_from_a_prefix(engine):
    prefix, whole = PROMPTS[0], PROMPTS[0] + PROMPTS[3]
    settings = Sampling(max_tokens=8, repetition_penalty=1.3, seed=5)
    shared = answers(engine, [Request(PROMPTS[3], settings)], prefix=engine.read(prefix))
    assert shared == answers(engine, [Request(whole, settings)])
    with pytest.raises(ValueError, match="no token after the prefix"):
        list(engine.run([Request([])], prefix=engine.read(prefix)))


def test_logprobs_are_the_models(engine):
    prompt = PROMPTS[2]
    pieces = list(engine.run([Request(prompt, Sampling(max_tokens=6, temperature=0.7, top_k=5, logprobs=True))]))
    tokens = [TOKENIZER.bos, *prompt, *(piece.token for piece in pieces if piece.token is not None)]
    logits = engine.model(torch.tensor([tokens]))[0, :, : TOKENIZER.vocab_size].log_softmax(dim=-1)
    for at, piece in enumerate((p for p in pieces if p.token is not None), len(prompt)):
        assert piece.logprob == pytest.approx(logits[at, piece.token].item(), abs=1e-4)
    assert next(engine.run([Request(prompt)])).logprob is None


def rigged(engine, text, monkeypatch):
    """Have the model say this and then BOS, whatever it is given."""
    ids = iter([*(TOKENIZER.encoding.encode_single_token(bytes([b])) for b in text.encode()), TOKENIZER.bos])

    def decode(idx, step, every=False):
        return torch.full((idx.size(0), 512), -1.0).index_fill(1, torch.tensor([next(ids)]), 1.0)

    monkeypatch.setattr(engine.model, "decode_step", decode)


@pytest.mark.parametrize(
    ("stop", "said", "why"),
    [
        ((), "one, twö. end", "bos"),
        ((".",), "one, twö", "stop"),
        (("ö. e",), "one, tw", "stop"),
        ((". x", "nd", ","), "one", "stop"),
        ((". x",), "one, twö. end", "bos"),
        (("end!",), "one, twö. end", "bos"),
    ],
)
def test_stop_texts_end_and_are_not_given_out(engine, monkeypatch, stop, said, why):
    rigged(engine, "one, twö. end", monkeypatch)
    _, [text], [end] = answers(engine, [Request([5], Sampling(temperature=0, stop=stop, max_tokens=20))])
    assert (text, end) == (said, why)


def test_stop_tokens_end(engine, monkeypatch):
    rigged(engine, "ab", monkeypatch)
    [b] = TOKENIZER.encode("b")
    [tokens], [text], [end] = answers(engine, [Request([5], Sampling(temperature=0, stop_tokens=(b,)))])
    assert (tokens, text, end) == (TOKENIZER.encode("a"), "a", "stop")


def test_a_character_that_is_cut_off_is_marked(engine, monkeypatch):
    rigged(engine, "漢漢", monkeypatch)
    _, [text], _ = answers(engine, [Request([5], Sampling(temperature=0, max_tokens=5))])
    assert text == "漢\ufffd"


def test_the_seed_decides_the_sample(engine):
    prompt = TOKENIZER.encode("def")
    a, b, c = (list(engine.generate(prompt, max_tokens=20, seed=seed)) for seed in (1, 1, 2))
    assert a == b != c


def test_an_empty_prompt_and_no_tokens_are_fine(engine):
    assert len(list(engine.generate([], max_tokens=3))) <= 3
    assert list(engine.generate([5], max_tokens=0)) == []


def test_generation_ends_where_a_new_document_would_start(engine, monkeypatch):
    rigged(engine, "", monkeypatch)
    assert list(engine.generate([5], max_tokens=9, temperature=0)) == []


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"max_tokens": -1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"stop": ("",)},
    ],
)
def test_settings_out_of_range_are_named(engine, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}: given"):
        list(engine.generate([1], **setting))


def sample(logits, samplings, draws, seen=()):
    had = torch.zeros(logits.shape, dtype=torch.bool)
    for row, ids in enumerate(seen):
        had[row, list(ids)] = True
    return draw(logits, settings_of(samplings), plan_of(samplings), torch.tensor(draws, dtype=torch.float64), had)


def counts(n=4000, seen=(), **settings):
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log().expand(n, -1)
    draws = [(i + 0.5) / n for i in range(n)]
    drawn = sample(logits, [Sampling(**settings)] * n, draws, [set(seen)] * n).tolist()
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


def test_min_p_keeps_what_has_a_share_of_the_likeliest():
    assert counts(min_p=1.0) == [1, 0, 0, 0]
    assert counts(min_p=0.3)[3] == 0 < counts(min_p=0.3)[2]
    assert counts(min_p=0.0) == counts()


def test_the_repetition_penalty_is_for_what_was_there():
    base = torch.tensor([2.0, 1.0, -1.0, 0.0])
    draws, penalised = [(i + 0.5) / 4000 for i in range(4000)], torch.tensor([1.0, 1.0, -2.0, 0.0]).softmax(dim=-1)
    drawn = sample(base.expand(4000, -1), [Sampling(repetition_penalty=2.0)] * 4000, draws, [{0, 2}] * 4000)
    assert [(drawn == i).float().mean().item() for i in range(4)] == pytest.approx(penalised.tolist(), abs=0.01)


def test_rows_have_settings_of_their_own():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log().expand(4, -1)
    rows = [Sampling(temperature=0), Sampling(top_k=1), Sampling(), Sampling(top_p=0.6)]
    assert sample(logits, rows, [0.999] * 4)[:3].tolist() == [0, 0, 3]
    assert sample(logits, rows, [0.999] * 4)[3] in (1, 2)


def test_characters_are_streamed_whole(engine, monkeypatch):
    text = "é 漢字 🙂"
    rigged(engine, text, monkeypatch)
    pieces = [piece.text for piece in engine.run([Request([5], Sampling(temperature=0, max_tokens=99))])]
    assert "".join(pieces) == text and pieces[0] == "" and "\ufffd" not in "".join(pieces)
