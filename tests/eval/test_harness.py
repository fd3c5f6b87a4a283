"""lm-evaluation-harness, the real package, on local tasks: against one forward pass a text."""

import functools
import json
import math

import numpy as np
import pytest
import torch
import yaml
from conftest import call, untrained_run

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from gkachat.data.loader import val_batches
from gkachat.data.shards import Documents
from gkachat.eval import lm_eval
from gkachat.eval.bpb import evaluate_bpb
from gkachat.eval.core import evaluate_core
from gkachat.eval.lm_eval import HarnessModel, evaluate
from gkachat.inference.engine import Engine
from gkachat.model.gpt import GPT, GPTConfig
from gkachat.tokenizer import train_tokenizer

T = 48
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. One two three four five six seven. "


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 20], 320)


@pytest.fixture(scope="module", params=["softmax", "gka"])
def model(request, tokenizer):
    """Knows TEXT by heart."""
    torch.manual_seed(0)
    config = GPTConfig(depth=2, attention=request.param, vocab_size=320, sequence_len=T, n_embd=32, head_dim=16)
    model, ids = GPT(config), torch.tensor(tokenizer.encode(TEXT * 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(80):
        starts = torch.randint(len(ids) - T, (8,))
        rows = torch.stack([torch.cat([torch.tensor([tokenizer.bos]), ids[i : i + T]]) for i in starts])
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logprobs(model, tokens):
    """(T - 1, V) of what follows each of the tokens, one forward pass."""
    with torch.no_grad():
        return model(torch.tensor([tokens[:-1]])).log_softmax(-1)[0]


def reference(model, tokenizer, context, continuation):
    """Log-likelihood and whether the continuation is the likeliest at each token."""
    # The harness's way: spaces at its end belong to the continuation, whose tokens are those beyond as many as it has.
    prompt = tokenizer.encode(context.rstrip())
    rest = tokenizer.encode(context + continuation)[len(prompt) :]
    whole, n = [tokenizer.bos, *prompt, *rest], len(rest)
    scores, target = logprobs(model, whole)[-n:], torch.tensor(whole[-n:])
    return scores.gather(1, target[:, None]).sum().item(), bool((scores.argmax(-1) == target).all())


@pytest.fixture(autouse=True)
def _own_tasks_only(monkeypatch):
    """The package's fourteen thousand take seconds to list."""
    monkeypatch.setattr(lm_eval, "TaskManager", functools.partial(lm_eval.TaskManager, include_defaults=False))


# Like LAMBADA's: a text whose last word is asked for, of every second a wrong one.
ROWS = [
    {"text": " ".join(TEXT.split()[n % 5 : n % 5 + n] + ["wrong"] * (n % 2)), "page": TEXT[: n * 7]}
    for n in range(4, 15)
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory with the three kinds of task."""
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(directory / "rows.jsonl")},
            "cache_dir": str(directory / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "test",
    }
    last_word = {"doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}", "doc_to_target": "{{' '+text.split(' ')[-1]}}"}
    kinds = {
        "last_word": {"output_type": "loglikelihood", **last_word, "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True}]},
        "pages": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "bits_per_byte"}]},
        "say": {"output_type": "generate_until", **last_word,
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 6, "do_sample": False, "num_beams": 1},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]},
    }  # fmt: skip
    for name, kind in kinds.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **kind}))
    both = {"group": "both", "task": ["last_word", "say"], "aggregate_metric_list": [{"metric": "acc"}]}
    (directory / "both.yaml").write_text(yaml.safe_dump(both))
    return directory


def asked(*args):
    return Instance("loglikelihood", {}, args, 0)


def test_a_last_word_task_counts_where_every_token_is_the_likeliest(model, tokenizer, tasks):
    scores, metrics = evaluate(HarnessModel(model, tokenizer, batch_size=5), ["last_word"], include_path=tasks)
    split = [row["text"].rpartition(" ") for row in ROWS]
    found = [reference(model, tokenizer, context, " " + word) for context, _, word in split]
    accuracy = sum(hit for _, hit in found) / len(found)
    assert 0 < accuracy < 1, "the rows tell nothing apart"
    score = scores["last_word"]
    assert score.accuracy == metrics["last_word"]["acc"] == pytest.approx(accuracy)
    assert (score.examples, score.centered) == (len(ROWS), None) and score.seconds > 0
    assert score.standard_error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (len(ROWS) - 1)))
    # Batched with padding against one by one, float32.
    expected = math.exp(-sum(nats for nats, _ in found) / len(found))
    assert metrics["last_word"]["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_it_is_the_accuracy_that_core_finds(model, tokenizer, tasks, tmp_path):
    """A language-modelling task of the same rows, zero-shot."""
    rows = [dict(zip(("context", "_", "continuation"), row["text"].rpartition(" "), strict=True)) for row in ROWS]
    (tmp_path / "eval_data").mkdir()
    (tmp_path / "eval_data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"label": "last_word", "icl_task_type": "language_modeling", "dataset_uri": "rows.jsonl", "num_fewshot": [0]}
    (tmp_path / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": [task]}))
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nlast_word,0\n")
    core = evaluate_core(model, tokenizer, tmp_path)["last_word"]
    scores, _ = evaluate(HarnessModel(model, tokenizer), ["last_word"], include_path=tasks)
    assert 0 < core["accuracy"] == scores["last_word"].accuracy < 1 and core["examples"] == len(ROWS)


def test_limit_takes_the_first_rows(model, tokenizer, tasks):
    scores, _ = evaluate(HarnessModel(model, tokenizer), ["last_word"], include_path=tasks, limit=3)
    assert scores["last_word"].examples == 3


def test_a_group_gives_the_scores_of_its_tasks_and_shots_are_put_in_front(model, tokenizer, tasks):
    lm = HarnessModel(model, tokenizer)
    scores, metrics = evaluate(lm, ["both"], include_path=tasks)
    alone, plain = evaluate(lm, ["last_word"], include_path=tasks)
    assert scores.keys() == {"last_word", "say"} and "both" in metrics
    assert scores["last_word"].accuracy == alone["last_word"].accuracy
    _, shots = evaluate(lm, ["last_word"], include_path=tasks, num_fewshot=1)
    assert shots["last_word"]["perplexity"] != plain["last_word"]["perplexity"]


def bits_per_byte(model, tokenizer, text):
    """evaluate_bpb of a text that is alone in its split."""
    tokens = np.array(tokenizer.encode(text), dtype=np.uint16)
    split = [Documents(np.array([0, len(tokens)]), lambda: tokens)]
    batches = val_batches(split, sequence_len=T, batch_rows=1, bos=tokenizer.bos)
    return evaluate_bpb(model, batches, tokenizer.token_bytes())


def test_rolling_likelihood_is_bits_per_byte_for_texts_that_fit_a_row(model, tokenizer, tasks):
    scores, metrics = evaluate(HarnessModel(model, tokenizer), ["pages"], include_path=tasks)
    pages = [row["page"] for row in ROWS]
    assert max(len(tokenizer.encode(page)) for page in pages) <= T
    n_bytes = [len(page.encode()) for page in pages]
    bits = sum(bits_per_byte(model, tokenizer, page) * n for page, n in zip(pages, n_bytes, strict=True))
    assert metrics["pages"]["bits_per_byte"] == pytest.approx(bits / sum(n_bytes), abs=1e-4)
    assert not scores


@pytest.mark.parametrize("n", [T, T + 1, 2 * T, 2 * T + 7])
def test_a_longer_text_is_predicted_once_each_window_with_all_the_context_it_can_have(model, tokenizer, n):
    text = tokenizer.decode(tokenizer.encode(TEXT * 20)[:n])
    tokens = [tokenizer.bos, *tokenizer.encode(text)]
    ends = [*range(T, len(tokens) - 1, T), len(tokens) - 1]
    expected, done = 0.0, 0
    for end in ends:  # predicts tokens[done + 1 .. end] from at most T tokens before
        piece = tokens[max(0, end - T) : end + 1]
        new = end - done
        scores, target = logprobs(model, piece)[-new:], torch.tensor(piece[-new:])
        expected += scores.gather(1, target[:, None]).sum().item()
        done = end
    (found,) = HarnessModel(model, tokenizer).loglikelihood_rolling([asked(text)])
    assert found == pytest.approx(expected, rel=1e-5)
    # Bits per byte start a piece with BOS where the harness goes on: the same for one row only.
    bpb = bits_per_byte(model, tokenizer, text) * math.log(2) * len(text.encode())
    assert (-found == pytest.approx(bpb, rel=1e-5)) == (len(tokens) <= T + 1)


def test_answers_are_those_of_one_text_at_a_time_and_come_in_order(model, tokenizer):
    """Choices after one context, long and short texts, and nothing in front."""
    asked_for = [(TEXT[:n], TEXT[n : n + m]) for n, m in ((60, 9), (3, 40), (30, 1), (21, 21), (60, 20))]
    asked_for += [(TEXT[:30], word) for word in (" one", " two", " the lazy dog")] + [("", TEXT[:9])]
    found = HarnessModel(model, tokenizer).loglikelihood([asked(*pair) for pair in asked_for], disable_tqdm=True)
    for (nats, hit), pair in zip(found, asked_for, strict=True):
        expected, expected_hit = reference(model, tokenizer, *pair)
        assert nats == pytest.approx(expected, rel=1e-4, abs=1e-4) and hit == expected_hit
    empty = HarnessModel(model, tokenizer).loglikelihood([asked("The quick", "")], disable_tqdm=True)
    assert empty == [(0.0, True)]


def test_a_text_too_long_loses_its_beginning_and_is_counted(model, tokenizer):
    lm, context = HarnessModel(model, tokenizer), TEXT * 2 + "The"
    ((found, _),) = lm.loglikelihood([asked(context, " quick end")], disable_tqdm=True)
    assert lm.truncated == 1
    ids = tokenizer.encode(context + " quick end")
    n = len(ids) - len(tokenizer.encode(context))
    kept = [tokenizer.bos, *ids[-T:]]
    scores, target = logprobs(model, kept)[-n:], torch.tensor(kept[-n:])
    assert found == pytest.approx(scores.gather(1, target[:, None]).sum().item(), rel=1e-5)
    lm.loglikelihood([asked("short", " text")], disable_tqdm=True)
    assert lm.truncated == 1
    with pytest.raises(ValueError, match="expected at most sequence_len 48"):
        lm.loglikelihood([asked("a", TEXT * 5)], disable_tqdm=True)


def test_generation_stops_where_it_is_told(model, tokenizer, tasks):
    lm = HarnessModel(model, tokenizer, batch_size=3)
    requests = [asked(row["text"], {"until": ["o"], "max_gen_toks": 8}) for row in ROWS]
    found = lm.generate_until(requests, disable_tqdm=True)
    for row, text in zip(ROWS, found, strict=True):
        prompt = tokenizer.encode(row["text"])
        whole = tokenizer.decode(list(Engine(model, tokenizer).generate(prompt, max_tokens=8, temperature=0)))
        assert text == whole.split("o")[0]
    assert any(found) and not lm.truncated
    scores, _ = evaluate(lm, ["say"], include_path=tasks)
    assert scores["say"].examples == len(ROWS) and lm.ignored == {"num_beams"}


def test_sampling_follows_the_tasks_options_and_the_seed(model, tokenizer):
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_k": 40}
    requests = [asked("The quick", options)] * 2

    def say(seed):
        return HarnessModel(model, tokenizer, seed=seed).generate_until(requests)

    first, second = say(1)
    assert first != second and say(1) == [first, second] != say(5)
    engine = Engine(model, tokenizer)
    drawn = engine.generate(tokenizer.encode("The quick"), max_tokens=12, temperature=1.5, top_k=40, seed=1)
    assert first == tokenizer.decode(list(drawn))


def test_a_prompt_too_long_leaves_room_for_the_answer(model, tokenizer):
    lm = HarnessModel(model, tokenizer)
    (found,) = lm.generate_until([asked(TEXT * 4, {"until": [], "max_gen_toks": 10})])
    kept = tokenizer.encode(TEXT * 4)[-(T - 1 - 10) :]
    drawn = Engine(model, tokenizer).generate(kept, max_tokens=10, temperature=0)
    assert lm.truncated == 1 and found == tokenizer.decode(list(drawn))


def test_unknown_tasks_and_missing_data_are_named(model, tokenizer, tasks, tmp_path):
    lm = HarnessModel(model, tokenizer)
    with pytest.raises(ValueError, match="task 'nonsense' cannot be loaded"):
        evaluate(lm, ["nonsense"], include_path=tasks)
    gone = yaml.safe_load((tasks / "pages.yaml").read_text().replace("rows.jsonl", "gone.jsonl")) | {"task": "gone"}
    (tmp_path / "gone.yaml").write_text(yaml.safe_dump(gone))
    with pytest.raises(ValueError, match=r"task 'gone' cannot be loaded: .*gone\.jsonl"):
        evaluate(lm, ["gone"], include_path=tmp_path)
    with pytest.raises(ValueError, match="limit 0"):
        evaluate(lm, ["pages"], include_path=tasks, limit=0)
    with pytest.raises(FileNotFoundError, match="no directory"):
        evaluate(lm, ["pages"], include_path=tmp_path / "none")


def test_the_script_leaves_a_report(tmp_path, tokenizer, tasks):
    untrained_run(tmp_path, "d1", tokenizer)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    options = ["d1", "--include-path", tasks, "--limit", 4, "--tasks"]
    result = call("lm_eval", *options, "last_word", "pages", home=tmp_path, **offline)
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "runs" / "d1" / "evals").glob("lm_eval_step_*.json")
    report = json.loads(path.read_text())
    assert report["scores"]["last_word"]["examples"] == 4 and report["limit"] == 4
    assert report["metrics"]["pages"]["bits_per_byte"] > 0 and "bits_per_byte" in result.stdout
