"""CORE: decisions equal those of a plain scorer, texts score as they do alone, partial results are not called CORE."""

import json

import core_reference as reference
import pytest
import torch
from conftest import ROOT, run_ranks, untrained_run
from core_reference import random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gkachat.checkpoint import load_model
from gkachat.config import ATTENTIONS, GKAConfig
from gkachat.eval import bundle as bundles
from gkachat.eval import core, scoring
from gkachat.eval.core import evaluate_core
from gkachat.eval.results import read_results
from gkachat.tokenizer import Tokenizer
from scripts import base_eval

SHARED = ROOT.parent / "shared" / "data" / "core_bundle"
MODELS = {
    **{attention: {"attention": attention} for attention in ATTENTIONS},
    "softmax without windows": {"attention": "softmax", "window_pattern": "L"},
    "gka with rope": {"attention": "gka", "gka": GKAConfig(rope=True)},
    "gka without self": {"attention": "gka", "gka": GKAConfig(include_self=False)},
    "gka normalized": {"attention": "gka", "gka": GKAConfig(normalize=True, rope=True)},
}


@pytest.fixture(scope="module")
def tokenizer(corpus_home):
    return Tokenizer.load(corpus_home / "tokenizer" / "python-source-v512")


def write_bundle(directory, tasks, baseline=25, delimiter=" "):
    """Write a bundle; `tasks` are {label: (kind, shots, rows)}."""
    (directory / "eval_data").mkdir(parents=True)
    lines, table = ["icl_tasks:"], ["Eval Task,Random baseline"]
    for label, (kind, shots, rows) in tasks.items():
        lines += ["-", f"  label: {label}", f"  dataset_uri: {label}.jsonl", f"  num_fewshot: [{shots}]"]
        lines += [f"  icl_task_type: {kind}", f"  continuation_delimiter: '{delimiter}'"]
        table.append(f"{label},{baseline}")
        (directory / "eval_data" / f"{label}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "core.yaml").write_text("\n".join(lines) + "\n")
    (directory / "eval_meta_data.csv").write_text("\n".join(table) + "\n")
    return directory


def choice(i):
    words = ["import os", "return", "def f(x):", "self", "None", "class A"]
    return {"query": f"Question {i}:", "choices": [f"{words[i % 6]} {i}", words[i % 5], "no"], "gold": i % 3}


def continuation(i):
    return {"context": f"number {i} is ", "continuation": f"{i} or so"}


def schema(i):
    options = [f"the {i} that is", f"a {i} cat was not what it"]
    return {"context_options": options, "continuation": "there.", "gold": i % 2}


SMALL = {
    "mc": ("multiple_choice", 3, [choice(i) for i in range(12)]),
    "schema": ("schema", 0, [schema(i) for i in range(10)]),
    "lm": ("language_modeling", 2, [continuation(i) for i in range(9)]),
}


@pytest.fixture
def small(tmp_path):
    return write_bundle(tmp_path / "bundle", SMALL)


def decisions(result):
    return {label: score["correct"] for label, score in result.items() if isinstance(score, dict)}


def expected(model, tokenizer, bundle, max_per_task=None):
    plain = reference.evaluate(model, tokenizer, bundle, max_per_task)
    return {label: [right for right, _ in rows] for label, rows in plain}


@pytest.mark.skipif(not SHARED.exists(), reason=f"no {SHARED}")
@pytest.mark.parametrize(
    ("name", "sequence_len"),
    [*((name, 1024) for name in ATTENTIONS), *((name, 300) for name in MODELS if name not in ("softmax", "gka"))],
)
def test_decisions_equal_those_of_the_plain_scorer(name, sequence_len, tokenizer):
    """At 300 tokens of context most prompts are truncated."""
    model = random_model(sequence_len=sequence_len, **MODELS[name])
    result = evaluate_core(model, tokenizer, SHARED, 11, tokens=3000)
    assert decisions(result) == expected(model, tokenizer, SHARED, 11)
    assert (result["piqa"]["truncated"] > 2) == (sequence_len == 300)  # one row is longer than 1,024 tokens


def test_continuations_that_the_model_would_write_are_right(tokenizer, tmp_path):
    model, rows = random_model(attention="gka"), []
    for i in range(120):
        context = f"{'abcdefghijkl'[i % 12]} = {i}" + "(-:[.x"[i % 6]
        if answer := reference.greedy_continuation(model, tokenizer, context, 2):
            rows.append({"context": context, "continuation": answer if len(rows) % 2 else "?!"})
    assert len(rows) > 5
    bundle = write_bundle(tmp_path / "own", {"own": ("language_modeling", 0, rows)}, baseline=0, delimiter="")
    result = evaluate_core(model, tokenizer, bundle)
    assert decisions(result) == expected(model, tokenizer, bundle)
    assert 0.3 < result["own"]["accuracy"] < 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decisions_do_not_depend_on_the_batch_size(dtype, tokenizer, small):
    model = random_model(dtype=dtype)
    results = [evaluate_core(model, tokenizer, small, tokens=tokens) for tokens in (1, 200, 10**6)]
    margins = {"float32": 0.0, "bfloat16": 0.1}  # in bfloat16, rounding decides what is as close as this
    for label, rows in reference.evaluate(model, tokenizer, small):
        for result in results:
            differing = [m for (right, m), other in zip(rows, result[label]["correct"], strict=True) if right != other]
            assert max(differing, default=0) <= margins[str(dtype).removeprefix("torch.")]
            assert not differing or dtype == torch.bfloat16


TOKENS = st.integers(0, 3)
PROPERTY_MODEL = random_model(vocab_size=8, sequence_len=64)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(TOKENS, min_size=1, max_size=20), st.lists(st.lists(TOKENS, max_size=6), min_size=1, max_size=4)
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 80),
)
def test_a_text_scores_as_it_does_alone(examples, max_tokens):
    """Whatever the texts share, wherever scoring starts, however they are batched."""
    groups, starts = [], {}
    for number, (head, tails) in enumerate(examples):
        texts = [(5, *head, *tail) for tail in tails]
        start = max(1, core.common_prefix(texts) - len(head) // 2)
        starts |= {(number, text): start for text in texts if len(text) > start}
        groups += core.group_texts(number, core.Example(texts, [start] * len(texts), 0, False))
    scores = {}
    with torch.inference_mode():
        for batch in scoring.batch_groups(groups, max_tokens):
            length = max(len(g.prefix) for g in batch) + max(len(g.continuations[0].tokens) for g in batch)
            assert len(batch) == 1 or len(batch) * length <= max_tokens
            new = scoring.score_groups(PROPERTY_MODEL, batch)
            assert not scores.keys() & new.keys()
            scores |= new
        assert scores.keys() == starts.keys()
        for (number, text), start in starts.items():
            alone, together = scoring.score_alone(PROPERTY_MODEL, text, start), scores[number, text]
            assert together.mean_loss == pytest.approx(alone.mean_loss, abs=1e-4)  # float32, losses of up to 20
            assert together.margin == pytest.approx(alone.margin, abs=1e-4)
            assert together.greedy == alone.greedy or alone.margin < 1e-4


def test_equal_choices_and_choices_that_others_continue_are_decided_as_in_the_reference(tokenizer, tmp_path):
    rows = [
        {"query": "Is it", "choices": ["yes", "yes"], "gold": 0},
        {"query": "Is it", "choices": ["yes", "yes"], "gold": 1},
        {"query": "Is it", "choices": ["no", "yes", "yes"], "gold": 1},
        {"query": "Is it", "choices": ["a", "a a a"], "gold": 0},  # nothing of the first is left to score
        {"query": "Is it", "choices": ["a a a", "a"], "gold": 0},
    ]
    bundle, model = write_bundle(tmp_path / "b", {"mc": ("multiple_choice", 0, rows)}), random_model()
    assert decisions(evaluate_core(model, tokenizer, bundle)) == expected(model, tokenizer, bundle)


def test_a_close_decision_is_made_again_alone(tokenizer, small, monkeypatch):
    model = random_model()
    monkeypatch.setattr(core, "MIN_MARGIN", 1e9)
    result = evaluate_core(model, tokenizer, small)
    assert decisions(result) == expected(model, tokenizer, small)
    assert all(result[label]["rescored"] == result[label]["examples"] for label in SMALL)


def test_only_all_tasks_on_all_rows_are_called_core(tokenizer, tmp_path):
    rows, model, seen = [choice(i) for i in range(4)], random_model(), []
    bundle = write_bundle(tmp_path / "whole", {label: ("multiple_choice", 0, rows) for label in bundles.TASKS})
    result = evaluate_core(model, tokenizer, bundle, on_progress=lambda label, done, total: seen.append((done, total)))
    assert result["name"] == "CORE" and result["core"] == result["mean_centered"] and not result["missing"]
    centered = [(sum(right) / 4 - 0.25) / 0.75 for right in decisions(result).values()]
    assert result["core"] == pytest.approx(sum(centered) / 22)
    assert seen[-1] == (88, 88) and seen == sorted(seen)
    cut = evaluate_core(model, tokenizer, bundle, 3)
    assert "core" not in cut and cut["name"] == "CORE, at most 3 rows of each"
    (bundle / "eval_data" / "squad.jsonl").unlink()
    result = evaluate_core(model, tokenizer, bundle)
    assert "core" not in result and result["missing"] == ["squad"]
    assert result["name"] == "mean centered over 21 of 22 tasks"


def test_an_interrupted_evaluation_continues_after_the_last_finished_task(tokenizer, small, tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt_after_two(label, result):
        if label == "schema":
            raise Interrupted

    model, kept = random_model(), {"partial": tmp_path / "partial.json", "partial_key": ["model"]}
    with pytest.raises(Interrupted):
        evaluate_core(model, tokenizer, small, **kept, on_task=interrupt_after_two)

    def evaluated(max_per_task=None, **kept):
        new = {}
        result = evaluate_core(model, tokenizer, small, max_per_task, **kept, on_task=new.__setitem__)
        assert decisions(result) == expected(model, tokenizer, small, max_per_task)
        return new.keys()

    assert evaluated(**kept) == {"lm"} and evaluated(**kept) == set()
    assert evaluated(8, **kept) == set(SMALL)  # other rows
    assert evaluated(8, **{**kept, "partial_key": ["another model"]}) == set(SMALL)


@pytest.fixture
def saved(tiny_home, tokenizer):
    """A run whose checkpoint is a model of random weights."""
    return untrained_run(tiny_home, "random", tokenizer, depth=2, sequence_len=256)


def test_processes_share_the_rows_and_write_one_result(saved, small, tiny_home, tokenizer):
    ended = run_ranks(2, "base_eval", "random", "--eval", "core", "--bundle", small, home=tiny_home)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("mean centered over 0 of 22 tasks and 3 others") == 1
    result = read_results(saved, 1)["core"]
    assert result["processes"] == 2 and result["missing"] == bundles.TASKS and "core" not in result
    assert decisions(result["scores"]) == expected(load_model(saved)[0], tokenizer, small)
    assert not list((saved / "evals").glob(".*"))


def test_the_script_prints_each_task_and_the_mean(saved, small, capsys):
    base_eval.main("random", eval="core", bundle=small, max_per_task=8)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if " centered " in line and "+-" in line] == [*SMALL]
    assert any("mean centered over 0 of 22 tasks and 3 others, at most 8 rows of each: " in line for line in lines)


def test_fewer_rows_than_shots_are_scored_with_the_shots_of_a_full_evaluation(tokenizer, small):
    model = random_model()
    full, cut = decisions(evaluate_core(model, tokenizer, small)), evaluate_core(model, tokenizer, small, 2)
    assert decisions(cut) == {label: right[:2] for label, right in full.items()}


def test_a_task_that_cannot_be_scored_is_named_and_the_others_are_scored(saved, small, tokenizer, capsys):
    (small / "core.yaml").write_text((small / "core.yaml").read_text().replace("[3]", "[12]", 1))
    base_eval.main("random", eval="core", bundle=small)
    result = read_results(saved, 1)["core"]
    reason = "mc: mc.jsonl: given 12 rows, expected more than its 12 shots"
    assert result["unscored"] == [reason] and f"  not scored: {reason}\n" in capsys.readouterr().out
    assert decisions(result["scores"]).keys() == {"schema", "lm"} and result["examples"] == 19


def test_a_short_evaluation_leaves_a_full_report_and_what_is_kept_of_an_interrupted_one(saved, small, monkeypatch):
    kept = saved / "evals" / ".core_step_000001.partial.json"
    base_eval.main("random", eval="core", bundle=small)
    kept.write_text("of a full evaluation")
    monkeypatch.setattr("sys.argv", ["base_eval", "--max-per-task", "2"])  # the same command would not evaluate again
    base_eval.main("random", eval="core", bundle=small, max_per_task=2)
    assert kept.read_text() == "of a full evaluation"
    names = {path.name for path in (saved / "evals").glob("*.json")} - {kept.name}
    assert names == {"core_step_000001.json", "core_2_step_000001.json"}
    assert read_results(saved, 1)["core"]["examples"] == 31
