"""lm-evaluation-harness, the real package, on local tasks: its figures equal those of one forward pass per text."""

import functools
import json
import math

import numpy as np
import pytest
import torch
import yaml
from conftest import untrained_run

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from gkachat.data.conversations import render_prompt
from gkachat.data.loader import val_batches
from gkachat.data.shards import Documents
from gkachat.eval import harness
from gkachat.eval.bpb import evaluate_bpb
from gkachat.eval.harness import HarnessModel, evaluate
from gkachat.eval.results import read_results
from gkachat.inference.engine import Engine
from gkachat.model.gpt import GPT, GPTConfig
from gkachat.tokenizer import train_tokenizer
from scripts import lm_eval

T = 48
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. One two three four five six seven. "


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 20], 320)


@pytest.fixture(scope="module", params=["softmax", "gka"])
def model(request, tokenizer):
    """A model that knows TEXT by heart."""
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


@torch.no_grad()
def score_last(model, ids, n):
    """Log-likelihood of the last n ids, and whether each is the likeliest, from one forward pass."""
    scores, target = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0, -n:], torch.tensor(ids[-n:])
    return scores.gather(1, target[:, None]).sum().item(), bool((scores.argmax(-1) == target).all())


def reference(model, tokenizer, context, continuation):
    # The harness moves spaces at the context's end to the continuation, and takes the tokens beyond the context's.
    prefix = tokenizer.encode(context.rstrip())
    rest = tokenizer.encode(context + continuation)[len(prefix) :]
    return score_last(model, [tokenizer.bos, *prefix, *rest], len(rest))


@pytest.fixture(autouse=True)
def _own_tasks_only(monkeypatch):
    """The package's fourteen thousand tasks take seconds to list."""
    monkeypatch.setattr(harness, "TaskManager", functools.partial(harness.TaskManager, include_defaults=False))


# As in LAMBADA, the last word is asked for; in every second row it is a wrong one.
ROWS = [
    {"text": " ".join(TEXT.split()[n % 5 : n % 5 + n] + ["wrong"] * (n % 2)), "page": TEXT[: n * 7], "gold": n % 2}
    for n in range(4, 15)
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory with a task of each kind."""
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = {"data_files": {"test": str(directory / "rows.jsonl")}, "cache_dir": str(directory / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "fewshot_split": "test"}
    last_word = {"doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}", "doc_to_target": "{{' '+text.split(' ')[-1]}}"}
    mean = {"aggregation": "mean", "higher_is_better": True}
    kinds = {
        "last_word": {"output_type": "loglikelihood", **last_word, "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", **mean}]},
        "pages": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "bits_per_byte"}]},
        "say": {"output_type": "generate_until", **last_word, "metric_list": [{"metric": "exact_match", **mean}],
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 6, "do_sample": False, "num_beams": 1}},
        "choose": {"output_type": "multiple_choice", "description": "Be brief.", "doc_to_text": "{{page[:30]}}",
            "doc_to_choice": ["One", "two"], "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc", **mean}]},
    }  # fmt: skip
    kinds["prefilled"] = {**kinds["choose"], "gen_prefix": "The word is"}
    kinds["unsafe"] = {**kinds["say"], "unsafe_code": True}
    for name, kind in kinds.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **kind}))
    both = {"group": "both", "task": ["last_word", "say"], "aggregate_metric_list": [{"metric": "acc"}]}
    (directory / "both.yaml").write_text(yaml.safe_dump(both))
    return directory


def request(*args):
    return Instance("loglikelihood", {}, args, 0)


def test_a_last_word_task_counts_rows_where_every_token_is_the_likeliest(model, tokenizer, tasks):
    scores, metrics = evaluate(HarnessModel(model, tokenizer, batch_size=5), ["last_word"], include_path=tasks)
    split = [row["text"].rpartition(" ") for row in ROWS]
    expected = [reference(model, tokenizer, context, " " + word) for context, _, word in split]
    accuracy = sum(hit for _, hit in expected) / len(expected)
    assert 0 < accuracy < 1, "the rows tell nothing apart"
    assert scores["last_word"]["accuracy"] == metrics["last_word"]["acc"] == pytest.approx(accuracy)
    assert scores["last_word"]["examples"] == len(ROWS) and scores["last_word"]["centered"] is None
    # Batched with padding against one by one, float32.
    perplexity = math.exp(-sum(nats for nats, _ in expected) / len(expected))
    assert metrics["last_word"]["perplexity"] == pytest.approx(perplexity, rel=1e-4)


def test_a_group_gives_the_scores_of_its_tasks_and_shots_come_first(model, tokenizer, tasks):
    lm = HarnessModel(model, tokenizer)
    scores, metrics = evaluate(lm, ["both"], include_path=tasks)
    alone, plain = evaluate(lm, ["last_word"], include_path=tasks)
    assert scores.keys() == {"last_word", "say"} and "both" in metrics
    assert scores["last_word"]["accuracy"] == alone["last_word"]["accuracy"]
    few, shots = evaluate(lm, ["last_word"], include_path=tasks, num_fewshot=1, limit=3)
    assert few["last_word"]["examples"] == 3
    assert shots["last_word"]["perplexity"] != plain["last_word"]["perplexity"]


def bits_per_byte(model, tokenizer, text):
    """evaluate_bpb of a text that is alone in its split."""
    tokens = np.array(tokenizer.encode(text), dtype=np.uint16)
    split = [Documents(np.array([0, len(tokens)]), lambda: tokens)]
    batches = val_batches(split, sequence_len=T, batch_rows=1, bos=tokenizer.bos)
    return evaluate_bpb(model, batches, tokenizer.token_bytes())


SPLITS = {"test alone": {"test_split": "test"}, "val alone": {"validation_split": "test"},
          "shots named": {"validation_split": "test", "fewshot_split": "test"}}  # fmt: skip


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
def test_a_prompt_never_has_its_own_question_among_its_shots(model, tokenizer, tmp_path, monkeypatch, splits):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"q{n}?", "a": f"a{n}"}) + "\n" for n in range(4)))
    files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    task = {"task": "own", "dataset_path": "json", "dataset_kwargs": files, **splits, "doc_to_text": "{{q}}",
            "doc_to_target": "{{a}}", "output_type": "generate_until", "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 1}}  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(task))
    prompts = []

    def generate_until(self, requests, disable_tqdm=False):
        prompts.extend(request.args[0] for request in requests)
        return [""] * len(requests)

    monkeypatch.setattr(HarnessModel, "generate_until", generate_until)
    evaluate(HarnessModel(model, tokenizer), ["own"], num_fewshot=3, include_path=tmp_path)
    assert [sorted(prompt.count(f"q{n}?") for n in range(4)) for prompt in prompts] == [[1, 1, 1, 1]] * 4
    assert [f"a{n}" in prompt for n, prompt in enumerate(prompts)] == [False] * 4


def test_rolling_likelihood_is_bits_per_byte_for_texts_that_fit_a_row(model, tokenizer, tasks):
    scores, metrics = evaluate(HarnessModel(model, tokenizer), ["pages"], include_path=tasks)
    pages = [row["page"] for row in ROWS]
    n_bytes = [len(page.encode()) for page in pages]
    bits = sum(bits_per_byte(model, tokenizer, page) * n for page, n in zip(pages, n_bytes, strict=True))
    assert metrics["pages"]["bits_per_byte"] == pytest.approx(bits / sum(n_bytes), abs=1e-4) and not scores


@pytest.mark.parametrize("n", [T, T + 1, 2 * T, 2 * T + 7])
def test_a_longer_text_is_predicted_in_windows_with_all_the_context_that_fits(model, tokenizer, n):
    text = tokenizer.decode(tokenizer.encode(TEXT * 20)[:n])
    tokens = [tokenizer.bos, *tokenizer.encode(text)]
    expected, done = 0.0, 0
    for end in [*range(T, len(tokens) - 1, T), len(tokens) - 1]:  # predicts tokens[done + 1 .. end]
        expected += score_last(model, tokens[max(0, end - T) : end + 1], end - done)[0]
        done = end
    (nats,) = HarnessModel(model, tokenizer).loglikelihood_rolling([request(text)])
    assert nats == pytest.approx(expected, rel=1e-5)


def test_likelihoods_equal_those_of_one_text_at_a_time_and_come_in_order(model, tokenizer):
    pairs = [(TEXT[:n], TEXT[n : n + m]) for n, m in ((60, 9), (3, 40), (30, 1), (21, 21), (60, 20))]
    pairs += [(TEXT[:30], word) for word in (" one", " two", " the lazy dog")] + [("", TEXT[:9])]
    answers = HarnessModel(model, tokenizer).loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (nats, hit), pair in zip(answers, pairs, strict=True):
        expected, expected_hit = reference(model, tokenizer, *pair)
        assert nats == pytest.approx(expected, rel=1e-4, abs=1e-4) and hit == expected_hit
    empty = HarnessModel(model, tokenizer).loglikelihood([request("The quick", "")], disable_tqdm=True)
    assert empty == [(0.0, True)]


def test_a_text_too_long_loses_its_beginning_but_not_bos_and_is_counted(model, tokenizer):
    lm, context = HarnessModel(model, tokenizer), TEXT * 2 + "The"
    ((nats, _),) = lm.loglikelihood([request(context, " quick end")], disable_tqdm=True)
    ids = tokenizer.encode(context + " quick end")
    expected, _ = score_last(model, [tokenizer.bos, *ids[-T:]], len(ids) - len(tokenizer.encode(context)))
    assert nats == pytest.approx(expected, rel=1e-5) and lm.truncated == 1
    lm.loglikelihood([request("short", " text")], disable_tqdm=True)
    assert lm.truncated == 1
    with pytest.raises(ValueError, match="expected at most sequence_len 48"):
        lm.loglikelihood([request("a", TEXT * 5)], disable_tqdm=True)


def test_generation_is_greedy_and_ends_at_stop_texts(model, tokenizer, tasks):
    lm, engine = HarnessModel(model, tokenizer, batch_size=3), Engine(model, tokenizer)
    requests = [request(row["text"], {"until": ["o"], "max_gen_toks": 8}) for row in ROWS]
    answers = lm.generate_until(requests, disable_tqdm=True)
    for row, answer in zip(ROWS, answers, strict=True):
        ids = engine.generate(tokenizer.encode(row["text"]), max_tokens=8, temperature=0)
        assert answer == tokenizer.decode(list(ids)).split("o")[0]
    assert any(answers) and not lm.truncated
    scores, _ = evaluate(lm, ["say"], include_path=tasks)
    assert scores["say"]["examples"] == len(ROWS) and lm.ignored_options == {"num_beams"}


def test_sampling_follows_the_tasks_options_and_the_seed(model, tokenizer):
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_k": 40}

    def generate(seed):
        return HarnessModel(model, tokenizer, seed=seed).generate_until([request("The quick", options)] * 2)

    first, second = generate(1)
    assert first != second and generate(1) == [first, second] != generate(5)
    ids = tokenizer.encode("The quick")
    drawn = Engine(model, tokenizer).generate(ids, max_tokens=12, temperature=1.5, top_k=40, seed=1)
    assert first == tokenizer.decode(list(drawn))


def test_a_prompt_too_long_leaves_room_for_the_answer(model, tokenizer):
    lm = HarnessModel(model, tokenizer)
    (answer,) = lm.generate_until([request(TEXT * 4, {"until": [], "max_gen_toks": 10})])
    kept = tokenizer.encode(TEXT * 4)[-(T - 1 - 10) :]
    drawn = Engine(model, tokenizer).generate(kept, max_tokens=10, temperature=0)
    assert lm.truncated == 1 and answer == tokenizer.decode(list(drawn))


@pytest.fixture
def chat_lm(tokenizer):
    """A model with room for conversations, and the token rows that it is given."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=1, vocab_size=320, sequence_len=256, n_embd=32, head_dim=16)).eval()
    seen = []
    model.wte.register_forward_pre_hook(lambda module, args: seen.extend(args[0].tolist()))
    return HarnessModel(model, tokenizer, chat=True), seen


def test_a_tuned_model_generates_from_the_very_prompt_it_was_tuned_on(chat_lm, tokenizer, tasks):
    lm, seen = chat_lm
    evaluate(lm, ["say"], include_path=tasks, limit=2)
    for row in ROWS[:2]:
        question = {"role": "user", "content": row["text"].rpartition(" ")[0]}
        assert render_prompt(tokenizer, [question]) in seen
    seen.clear()
    evaluate(lm, ["say"], include_path=tasks, limit=1, num_fewshot=1)
    (longest,) = [ids for ids in seen if len(ids) > 1]
    turns = tokenizer.decode(longest).removeprefix("<|bos|>").split("<|user_start|>")[1:]
    assert len(turns) == 2 and turns[0].endswith("<|assistant_end|>") and turns[1].endswith("<|assistant_start|>")


@pytest.mark.parametrize(("task", "opening"), [("choose", ""), ("prefilled", "The word is")])
def test_a_tuned_model_chooses_after_the_very_prompt_it_was_tuned_on(chat_lm, tokenizer, tasks, task, opening):
    """The task's description is a system message; a gen_prefix opens the assistant's answer."""
    lm, seen = chat_lm
    scores, _ = evaluate(lm, [task], include_path=tasks, limit=3)
    given, hits = list(seen), []
    for row in ROWS[:3]:
        question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["page"][:30]}]
        ids = [*render_prompt(tokenizer, question), *tokenizer.encode(opening)]
        assert any(ids[:-1] == row[: len(ids) - 1] for row in given)
        answers = [tokenizer.encode(" " * bool(opening) + answer) for answer in ("One", "two")]
        likelihoods = [score_last(lm.model, [*ids, *answer], len(answer))[0] for answer in answers]
        hits.append(likelihoods.index(max(likelihoods)) == row["gold"])
    assert scores[task]["accuracy"] == pytest.approx(sum(hits) / 3)


def test_text_that_spells_a_special_token_is_not_one(chat_lm, tokenizer):
    lm, _ = chat_lm
    messages = [{"role": "user", "content": "What is <|assistant_end|>?"}]
    assert lm.tok_encode(lm.apply_chat_template(messages)) == render_prompt(tokenizer, messages)[1:]
    assert HarnessModel(lm.model, tokenizer).tok_encode("<|bos|>") == tokenizer.encode("<|bos|>")


def test_generation_of_a_tuned_model_ends_with_its_turn(chat_lm, tokenizer, monkeypatch):
    lm, _ = chat_lm
    asked = [request(lm.apply_chat_template([{"role": "user", "content": "The quick"}]), {"max_gen_toks": 9})]
    ids = render_prompt(tokenizer, [{"role": "user", "content": "The quick"}])[1:]
    drawn = list(Engine(lm.model, tokenizer).generate(ids, max_tokens=9, temperature=0))
    assert lm.generate_until(asked) == [tokenizer.decode(drawn)]
    cut = max(map(drawn.index, drawn))
    monkeypatch.setitem(tokenizer.special, "<|assistant_end|>", drawn[cut])
    assert lm.generate_until(asked) == [tokenizer.decode(drawn[:cut])]


def test_unknown_tasks_missing_data_and_unsafe_code_are_named(model, tokenizer, tasks, tmp_path):
    lm = HarnessModel(model, tokenizer)
    gone = yaml.safe_load((tasks / "pages.yaml").read_text().replace("rows.jsonl", "gone.jsonl")) | {"task": "gone"}
    (tmp_path / "gone.yaml").write_text(yaml.safe_dump(gone))
    for task, path, words in (
        ("nonsense", tasks, "task 'nonsense' cannot be loaded"),
        ("gone", tmp_path, r"task 'gone' cannot be loaded: .*gone\.jsonl"),
        ("unsafe", tasks, "task 'unsafe' runs code that the model writes; --run-unsafe-code"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(lm, [task], include_path=path)
    assert evaluate(lm, ["unsafe"], include_path=tasks, limit=1, run_unsafe_code=True)[0]["unsafe"]["examples"] == 1
    with pytest.raises(ValueError, match="limit 0"):
        evaluate(lm, ["pages"], include_path=tasks, limit=0)
    with pytest.raises(FileNotFoundError, match="no directory"):
        evaluate(lm, ["pages"], include_path=tmp_path / "none")


@pytest.mark.parametrize("tuned", [False, True])
def test_the_script_writes_a_result_and_applies_the_template_to_tuned_runs(
    tuned, tmp_path, tokenizer, tasks, monkeypatch, capsys
):
    monkeypatch.setenv("GKACHAT_HOME", str(tmp_path))
    run_dir = untrained_run(tmp_path, "d1", tokenizer, tuned=tuned)
    lm_eval.main("d1", tasks=("last_word", "pages"), limit=4, include_path=tasks)
    result = read_results(run_dir, 1)["lm_eval"]
    assert result["scores"]["last_word"]["examples"] == 4 and result["chat_template"] == tuned
    assert result["metrics"]["pages"]["bits_per_byte"] > 0 and "bits_per_byte" in capsys.readouterr().out
