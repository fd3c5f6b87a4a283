"""Generation: greedy and sampled, alone and in a batch, token by token."""

import pytest
import torch
from conftest import live_model
from torch._dynamo.utils import counters

from gkachat.config import ATTENTIONS
from gkachat.inference import decoder
from gkachat.inference.engine import Engine, Request, Sampling
from gkachat.inference.sampling import make_plan, settings_tensor
from gkachat.inference.sampling import sample as draw
from gkachat.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["def add(a, b):\n    return a + b  # é 漢\n"] * 3, 512)
PROMPTS = [TOKENIZER.encode(text) for text in ("def add", "", "return", "a, b", "é 漢", "    ", "def", "#")]


@pytest.fixture(params=list(ATTENTIONS))
def engine(request):
    return Engine(live_model(request.param, vocab_size=512, sequence_len=24), TOKENIZER)


@pytest.fixture
def rigged(monkeypatch):
    """Function that returns an engine whose model writes a text, byte by byte, and then BOS."""

    def rigged(text):
        ids = iter([*(TOKENIZER.encoding.encode_single_token(bytes([b])) for b in text.encode()), TOKENIZER.bos])
        engine = Engine(live_model("gka", vocab_size=512, sequence_len=24), TOKENIZER)

        def forward(idx, cache, logits_to_keep):
            return torch.full((idx.size(0), 1, 512), -1.0).index_fill(2, torch.tensor([next(ids)]), 1.0)

        monkeypatch.setattr(engine.model, "forward", forward)
        return engine

    return rigged


def answers(engine, requests, **options):
    """Return tokens, text and reason of the end of each request."""
    tokens, texts, ends = ([[] for _ in requests] for _ in range(3))
    for output in engine.run(requests, **options):
        tokens[output.request] += [] if output.token is None else [output.token]
        texts[output.request].append(output.text)
        ends[output.request] += [output.finished] if output.finished else []
    assert all(len(end) == 1 for end in ends)
    return tokens, ["".join(text) for text in texts], [end[0] for end in ends]


def test_temperature_zero_takes_the_likeliest_token_until_the_context_is_full(engine):
    for prompt in PROMPTS[:3]:
        tokens = [TOKENIZER.bos, *prompt]
        while len(tokens) <= 24:
            tokens.append(int(engine.model(torch.tensor([tokens]))[0, -1, : TOKENIZER.vocab_size].argmax()))
        expected = tokens[1 + len(prompt) :]
        if TOKENIZER.bos in expected:
            expected = expected[: expected.index(TOKENIZER.bos)]
        assert list(engine.generate(prompt, max_tokens=100, temperature=0)) == expected


def test_the_last_output_names_the_reason_of_the_end(engine):
    requests = [Request(PROMPTS[0], Sampling(max_tokens=n, temperature=0)) for n in (0, 2, 100)]
    assert answers(engine, requests)[2] in (["max_tokens", "max_tokens", "sequence_len"], ["max_tokens"] * 2 + ["bos"])


def test_a_prompt_that_leaves_no_room_is_an_error(engine):
    with pytest.raises(ValueError, match="the prompt: given 25 tokens, expected at most sequence_len 24"):
        list(engine.generate([5] * 24))
    with pytest.raises(ValueError, match="the prompt: given 27 tokens, expected at most sequence_len 24"):
        list(engine.run([Request([5])], prefix=engine.read([5] * 25)))


def test_an_empty_prompt_and_no_tokens_are_fine(engine):
    assert len(list(engine.generate([], max_tokens=3))) <= 3
    assert list(engine.generate([5], max_tokens=0)) == []


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_other_requests_in_the_batch_make_no_difference(engine, temperature):
    requests = [
        Request(prompt, Sampling(max_tokens=3 + 2 * i, temperature=temperature, seed=i, top_k=40))
        for i, prompt in enumerate(PROMPTS)
    ]
    alone = [list(engine.generate(r.tokens, **vars(r.sampling))) for r in requests]
    for rows in (3, 8):
        assert answers(engine, requests, rows=rows)[0] == alone


def test_a_step_of_fixed_shapes_gives_the_same_tokens(engine, monkeypatch):
    """CUDA graphs and compiled steps have fixed shapes; this one is not compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(decoder, "ROUND", 10)
    settings = [Sampling(max_tokens=2 + 3 * i, seed=i, top_k=40, repetition_penalty=1.0 + 0.1 * i) for i in range(8)]
    requests = [Request(prompt, s) for prompt, s in zip(PROMPTS, settings, strict=True)]
    fixed = Engine(engine.model, TOKENIZER, compile=True)
    assert answers(fixed, requests, rows=3) == answers(engine, requests, rows=3)


def test_a_compiled_step_gives_the_same_tokens():
    model = live_model("gka", depth=1, vocab_size=512, sequence_len=24)
    requests = [
        Request(prompt, Sampling(max_tokens=15 - i, seed=i, top_p=0.9, logprobs=True))
        for i, prompt in enumerate(PROMPTS)
    ]
    compiled, plain = (answers(Engine(model, TOKENIZER, compile=c), requests, rows=3) for c in (True, False))
    assert compiled == plain


def test_steps_of_many_models_are_all_compiled(monkeypatch):
    """They share one function, whose compilations torch limits: above the limit it would run uncompiled, silently."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile(function, backend="eager"))
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(recompile_limit=1):
        for attention in ("softmax", "gka"):
            model = live_model(attention, depth=1, vocab_size=512, sequence_len=24)
            list(Engine(model, TOKENIZER, compile=True).generate(PROMPTS[0], max_tokens=3))
    assert counters["stats"]["unique_graphs"] - before == 2


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_requests_that_join_and_leave_a_batch_get_the_answers_they_get_alone(engine, temperature):
    settings = [Sampling(max_tokens=4 + 2 * i, temperature=temperature, seed=i) for i in range(len(PROMPTS))]
    requests = [Request(prompt, s) for prompt, s in zip(PROMPTS, settings, strict=True)]
    alone = [list(engine.generate(r.tokens, **vars(r.sampling))) for r in requests]
    batch, waiting, tokens, cancelled = engine.batch(rows=3), list(enumerate(requests)), [[] for _ in requests], {}
    for n_steps in range(1000):
        outputs = []
        if batch.has_room and waiting and n_steps % 2:  # joins beside rows of any length
            outputs.append(batch.add(*waiting.pop(0)))
        if n_steps in (3, 8):  # a first row leaves, and a later one
            number = batch.texts[(n_steps == 8) * (len(batch) - 1)].request
            batch.cancel(number)
            cancelled[number] = len(tokens[number])
        outputs += batch.step() if len(batch) else []
        for output in outputs:
            tokens[output.request] += [] if output.token is None else [output.token]
        if not waiting and not len(batch):
            break
    assert len(cancelled) == 2 and len(batch) == 0
    assert tokens == [answer[: cancelled.get(number)] for number, answer in enumerate(alone)]
    batch.cancel(0)  # has left: nothing happens
    with pytest.raises(ValueError, match="expected at most sequence_len"):
        batch.add(0, Request([5] * 24))
    assert len(batch) == 0


def test_samples_of_one_prompt_are_those_of_their_seeds(engine):
    got = engine.samples(PROMPTS[0], 5, rows=3, max_tokens=9, seed=7)
    assert got == [list(engine.generate(PROMPTS[0], max_tokens=9, seed=7 + i)) for i in range(5)]
    assert len({tuple(tokens) for tokens in got}) > 1
    assert len(engine.samples([], 2, max_tokens=3)) == 2


def test_requests_continue_a_prefix_that_was_read_once(engine):
    settings = Sampling(max_tokens=8, repetition_penalty=1.3, seed=5)
    continued = answers(engine, [Request(PROMPTS[3], settings)], prefix=engine.read(PROMPTS[0]))
    assert continued == answers(engine, [Request(PROMPTS[0] + PROMPTS[3], settings)])
    with pytest.raises(ValueError, match="no token after the prefix"):
        list(engine.run([Request([])], prefix=engine.read(PROMPTS[0])))


def test_logprobs_are_the_models(engine):
    prompt = PROMPTS[2]
    settings = Sampling(max_tokens=6, temperature=0.7, top_k=5, logprobs=True, top_logprobs=3)
    outputs = [output for output in engine.run([Request(prompt, settings)]) if output.token is not None]
    tokens = [TOKENIZER.bos, *prompt, *(output.token for output in outputs)]
    logits = engine.model(torch.tensor([tokens]))[0, :, : TOKENIZER.vocab_size].log_softmax(dim=-1)
    for position, output in enumerate(outputs, len(prompt)):
        assert output.logprob == pytest.approx(logits[position, output.token].item(), abs=1e-4)
        highest, ids = logits[position].topk(3)
        assert [id for id, _ in output.top_logprobs] == ids.tolist()
        assert [logprob for _, logprob in output.top_logprobs] == pytest.approx(highest.tolist(), abs=1e-4)
    other = next(engine.run([Request(prompt)]))
    assert other.logprob is None and not other.top_logprobs


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ((), "one, twö. end", "bos"),
        ((".",), "one, twö", "stop"),
        (("ö. e",), "one, tw", "stop"),
        ((". x", "nd", ","), "one", "stop"),
        ((". x",), "one, twö. end", "bos"),
        (("end!",), "one, twö. end", "bos"),
    ],
)
def test_stop_texts_end_the_answer_and_are_not_emitted(rigged, stop, text, reason):
    request = Request([5], Sampling(temperature=0, stop=stop, max_tokens=20))
    assert answers(rigged("one, twö. end"), [request])[1:] == ([text], [reason])


def test_stop_tokens_end_the_answer(rigged):
    [b] = TOKENIZER.encode("b")
    request = Request([5], Sampling(temperature=0, stop_tokens=(b,)))
    assert answers(rigged("ab"), [request]) == ([TOKENIZER.encode("a")], ["a"], ["stop"])


def test_characters_are_emitted_whole_and_one_that_is_cut_off_is_marked(rigged):
    assert answers(rigged("漢漢"), [Request([5], Sampling(temperature=0, max_tokens=5))])[1] == ["漢\ufffd"]
    text = "é 漢字 🙂"
    outputs = [output.text for output in rigged(text).run([Request([5], Sampling(temperature=0, max_tokens=99))])]
    assert "".join(outputs) == text and outputs[0] == "" and "\ufffd" not in "".join(outputs)


def test_settings_out_of_range_are_errors():
    wrong = {"temperature": -1.0, "top_k": 0, "top_p": 1.5, "max_tokens": -1, "min_p": 2.0, "stop": ("",)}
    for name, value in (wrong | {"repetition_penalty": 0.0}).items():
        with pytest.raises(ValueError, match=f"{name}: given"):
            Sampling(**{name: value})


LOGITS = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()


def sample(logits, samplings, draws, seen=()):
    occurred = torch.zeros(logits.shape, dtype=torch.bool)
    occurred[:, list(seen)] = True
    draws = torch.tensor(draws, dtype=torch.float64)
    return draw(logits, settings_tensor(samplings), make_plan(samplings), draws, occurred)


def frequencies(logits=LOGITS, n=4000, seen=(), **settings):
    """Return how often each id is drawn, over draws spread evenly over [0, 1)."""
    draws = [(i + 0.5) / n for i in range(n)]
    drawn = sample(logits.expand(n, -1), [Sampling(**settings)] * n, draws, seen).tolist()
    return [drawn.count(i) / n for i in range(4)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [5, 2, 2, 1]),
        ({"temperature": 0.5}, [25, 4, 4, 1]),
        ({"temperature": 1e-40}, [1, 0, 0, 0]),  # a number that float32 has not
        ({"temperature": 1e-300}, [1, 0, 0, 0]),
        ({"temperature": 1e300}, [1, 1, 1, 1]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 9}, [5, 2, 2, 1]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),  # at least one id stays
        ({"top_p": 0.9}, [5, 2, 2, 0]),
        ({"top_p": 1.0}, [5, 2, 2, 1]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"min_p": 0.3}, [5, 2, 2, 0]),
        ({"min_p": 0.0}, [5, 2, 2, 1]),
    ],
)
def test_samples_follow_the_probabilities_that_settings_leave(settings, expected):
    assert frequencies(**settings) == pytest.approx([n / sum(expected) for n in expected], abs=1e-3)


def test_the_repetition_penalty_is_for_ids_that_occurred():
    logits, penalised = torch.tensor([2.0, 1.0, -1.0, 0.0]), torch.tensor([1.0, 1.0, -2.0, 0.0])
    got = frequencies(logits, seen=(0, 2), repetition_penalty=2.0)
    assert got == pytest.approx(penalised.softmax(dim=-1).tolist(), abs=1e-3)


@pytest.mark.parametrize(("penalty", "expected"), [(1e-300, [1, 0, 0, 0]), (1e300, [4, 11, 0, 4])])
@pytest.mark.parametrize("temperature", [1.0, 1e-300])
def test_penalties_that_float32_has_not_still_give_probabilities(penalty, expected, temperature):
    logits = torch.tensor([15.0, 1.0, -15.0, 0.0])  # as large as a model's
    got = frequencies(logits, seen=(0, 2), repetition_penalty=penalty, temperature=temperature)
    if temperature < 1:
        expected = [float(n == max(expected)) for n in expected]
    assert got == pytest.approx([n / sum(expected) for n in expected], abs=0.02)


def test_rows_have_settings_of_their_own():
    rows = [Sampling(temperature=0), Sampling(top_k=1), Sampling(), Sampling(top_p=0.6)]
    ids = sample(LOGITS.expand(4, -1), rows, [0.999] * 4).tolist()
    assert ids[:3] == [0, 0, 3] and ids[3] in (1, 2)


def test_settings_beyond_float32_act_as_their_limits():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.2])
    assert frequencies(logits, temperature=1e-300) == [0, 0, 1, 0]
    assert frequencies(logits, seen=(0,), repetition_penalty=1e-300, top_k=1) == [1, 0, 0, 0]
    assert frequencies(-logits, seen=(0,), repetition_penalty=1e300) == pytest.approx(
        [0, *(-logits[1:]).softmax(dim=-1).tolist()], abs=1e-3
    )
