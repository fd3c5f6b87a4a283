"""CORE against a plain scorer, its rules against figures done by hand, and bundles that are not what they should be."""

import json
import random
import shutil
import zipfile

import core_reference as reference
import pytest
import torch
from check_core import own_answer
from conftest import ROOT, TINY, call, launch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkachat.checkpoint import Saver, start_run
from gkachat.config import GKAConfig, GPTConfig, home
from gkachat.config_file import load_config
from gkachat.eval import bundle as bundles
from gkachat.eval import core
from gkachat.eval.core import evaluate_core
from gkachat.eval.report import read_reports
from gkachat.files import sha256
from gkachat.model.gpt import GPT
from gkachat.tokenizer import Tokenizer

SHARED = ROOT.parent / "shared" / "data" / "core_bundle"
MODELS = {
    "softmax": {"attention": "softmax"},
    "softmax, no windows": {"attention": "softmax", "window_pattern": "L"},
    "gka": {"attention": "gka"},
    "gka, rope": {"attention": "gka", "gka": GKAConfig(rope=True)},
    "gka, without self": {"attention": "gka", "gka": GKAConfig(include_self=False)},
    "gka, normalized": {"attention": "gka", "gka": GKAConfig(normalize=True, rope=True)},
}


def moved_model(vocab_size=512, sequence_len=1024, dtype=torch.float32, **options):
    """Small, of random weights, none of them zero."""
    torch.manual_seed(0)
    config = GPTConfig(depth=2, n_embd=32, head_dim=16, vocab_size=vocab_size, sequence_len=sequence_len, **options)
    model = GPT(config, dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def tokenizer(corpus_home):
    return Tokenizer.load(corpus_home / "tokenizer" / "python-source-v512")


def write_bundle(directory, tasks, baseline=25):
    """tasks: {label: (kind, shots, rows)}"""
    (directory / "eval_data").mkdir(parents=True)
    lines, table = ["icl_tasks:"], ["Eval Task,Random baseline"]
    for label, (kind, shots, rows) in tasks.items():
        lines += ["-", f"  label: {label}", f"  dataset_uri: {label}.jsonl", f"  num_fewshot: [{shots}]"]
        lines += [f"  icl_task_type: {kind}"]
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
    return {
        "context_options": [f"the {i} that is", f"a {i} cat was not what it"],
        "continuation": "there.",
        "gold": i % 2,
    }


SMALL = {
    "mc": ("multiple_choice", 3, [choice(i) for i in range(12)]),
    "schema": ("schema", 0, [schema(i) for i in range(10)]),
    "lm": ("language_modeling", 2, [continuation(i) for i in range(9)]),
}


@pytest.fixture
def small(tmp_path):
    return write_bundle(tmp_path / "bundle", SMALL)


def decisions(found):
    return {label: told["correct"] for label, told in found.items() if isinstance(told, dict)}


def expected(model, tokenizer, bundle, max_per_task=None):
    plain = reference.evaluate(model, tokenizer, bundle, max_per_task)
    return {label: [right for right, _ in rows] for label, rows in plain.items()}


@pytest.mark.parametrize("sequence_len", [1024, 300])
@pytest.mark.parametrize("name", MODELS)
def test_decisions_are_those_of_the_plain_scorer(name, sequence_len, tokenizer):
    """300: most prompts are longer, and are cut."""
    if not SHARED.exists():
        pytest.skip(f"no {SHARED}")
    model = moved_model(sequence_len=sequence_len, **MODELS[name])
    found = evaluate_core(model, tokenizer, SHARED, 11, tokens=3000)
    assert decisions(found) == expected(model, tokenizer, SHARED, 11)
    assert (found["piqa"]["cut"] > 0) == (sequence_len == 300)


def test_continuations_that_the_model_would_write_count_as_right(tokenizer, tmp_path):
    model, rows = moved_model(attention="gka"), []
    for i in range(120):
        context = f"{'abcdefghijkl'[i % 12]} = {i}" + "(-:[.x"[i % 6]
        if answer := own_answer(model, tokenizer, context, 2):
            rows.append({"context": context, "continuation": answer if len(rows) % 2 else "?!"})
    assert len(rows) > 5
    directory = write_bundle(tmp_path / "own", {"own": ("language_modeling", 0, rows)}, baseline=0)
    with open(directory / "core.yaml", "a") as file:
        file.write("  continuation_delimiter: ''\n")
    found = evaluate_core(model, tokenizer, directory)
    assert decisions(found) == expected(model, tokenizer, directory)
    assert 0.3 < found["own"]["accuracy"] < 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_the_budget_nor_the_order_of_batches_decides(dtype, tokenizer, small):
    model = moved_model(dtype=dtype)
    found = [evaluate_core(model, tokenizer, small, tokens=tokens) for tokens in (1, 200, 10**6)]
    if dtype == torch.float32:
        assert decisions(found[0]) == decisions(found[1]) == decisions(found[2]) == expected(model, tokenizer, small)
    else:  # only what is close may fall the other way
        plain = reference.evaluate(model, tokenizer, small)
        for told in found:
            for label, rows in plain.items():
                assert all(a == b or margin < 0.1 for (a, margin), b in zip(rows, told[label]["correct"], strict=True))


TOKENS = st.integers(0, 3)


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
def test_each_text_has_the_scores_it_has_by_itself(examples, tokens):
    """Whatever the texts share, wherever they are scored from, however they are batched."""
    model = PROPERTY_MODEL
    found, texts = [], {}
    for number, (head, tails) in enumerate(examples):
        sequences = [(5, *head, *tail) for tail in tails]
        start = max(1, core.common_prefix(sequences) - len(head) // 2)
        example = core.Example(sequences, [start] * len(sequences), 0, False)
        texts |= {(number, text): start for text in sequences if len(text) > start}
        found += core.groups(number, example)
    scored = {}
    with torch.inference_mode():
        for batch in core.batches(found, tokens):
            size = len(batch) * (max(len(g.prefix) for g in batch) + max(len(g.tails[0][1]) for g in batch))
            assert len(batch) == 1 or size <= tokens
            new = core.score(model, batch)
            assert not scored.keys() & new.keys()
            scored |= new
        assert scored.keys() == texts.keys()
        for (_, text), start in texts.items():
            alone, together = core.score_alone(model, text, start), scored[_, text]
            assert together.mean_loss == pytest.approx(alone.mean_loss, abs=1e-4)  # float32, losses of up to 20
            assert together.lead == pytest.approx(alone.lead, abs=1e-4)
            assert together.hits == alone.hits or alone.lead < 1e-4


PROPERTY_MODEL = moved_model(vocab_size=8, sequence_len=64)


def test_equal_choices_and_choices_that_others_go_on_from(tokenizer, tmp_path):
    rows = [
        {"query": "Is it", "choices": ["yes", "yes"], "gold": 0},
        {"query": "Is it", "choices": ["yes", "yes"], "gold": 1},
        {"query": "Is it", "choices": ["no", "yes", "yes"], "gold": 1},
        {"query": "Is it", "choices": ["a", "a a a"], "gold": 0},  # of the first nothing is left to score
        {"query": "Is it", "choices": ["a a a", "a"], "gold": 0},
    ]
    directory = write_bundle(tmp_path / "b", {"mc": ("multiple_choice", 0, rows)})
    model = moved_model()
    found = evaluate_core(model, tokenizer, directory)
    assert decisions(found) == expected(model, tokenizer, directory)


def test_a_decision_that_hangs_on_rounding_is_made_again_alone(tokenizer, small, monkeypatch):
    model = moved_model()
    monkeypatch.setattr(core, "TOO_CLOSE", 1e9)
    found = evaluate_core(model, tokenizer, small)
    assert decisions(found) == expected(model, tokenizer, small)
    assert all(found[label]["rescored"] == found[label]["examples"] for label in SMALL)


def test_prompts_follow_the_rules(small):
    task = next(task for task in bundles.read_bundle(small) if task.label == "lm")
    rows = [continuation(i) for i in range(9)]
    random.Random(1337).shuffle(rows)
    assert task.rows == rows
    shots = [rows[i] for i in random.Random(1234 + 4).sample([0, 1, 2, 3, 5, 6, 7, 8], 2)]
    head = "".join(f"{shot['context'].strip()} {shot['continuation']}\n\n" for shot in shots)
    prompt = head + rows[4]["context"].strip()
    assert bundles.prompts(task, 4) == [prompt, f"{prompt} {rows[4]['continuation']}"]


def test_scores_are_centered_and_have_errors(tokenizer, small):
    found = evaluate_core(moved_model(), tokenizer, small)
    for label, (_, _, rows) in SMALL.items():
        told = found[label]
        accuracy = sum(told["correct"]) / len(rows)
        assert told["examples"] == len(rows) and told["accuracy"] == pytest.approx(accuracy)
        assert told["centered"] == pytest.approx((accuracy - 0.25) / 0.75)
        assert told["standard_error"] == pytest.approx((accuracy * (1 - accuracy) / len(rows)) ** 0.5)
    assert found["mean_centered"] == pytest.approx(sum(found[label]["centered"] for label in SMALL) / 3)


def test_only_all_tasks_on_all_rows_are_called_core(tokenizer, tmp_path):
    rows = [choice(i) for i in range(4)]
    whole = write_bundle(tmp_path / "whole", {label: ("multiple_choice", 0, rows) for label in bundles.TASKS})
    model, seen = moved_model(), []
    found = evaluate_core(model, tokenizer, whole, on_progress=lambda label, done, total: seen.append((done, total)))
    assert found["name"] == "CORE" and found["core"] == found["mean_centered"] and not found["missing"]
    assert seen[-1] == (88, 88) and seen == sorted(seen)
    cut = evaluate_core(model, tokenizer, whole, 3)
    assert "core" not in cut and cut["name"] == "CORE, at most 3 rows of each"
    (whole / "eval_data" / "squad.jsonl").unlink()
    found = evaluate_core(model, tokenizer, whole)
    assert "core" not in found and found["missing"] == ["squad"]
    assert found["name"] == "mean centered over 21 of 22 tasks"


@pytest.mark.parametrize("folder", ["", "eval_bundle/"])
def test_a_zip_is_read_as_its_directory_is(tokenizer, small, folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in small.rglob("*.*"):
            archive.write(path, folder + str(path.relative_to(small)))
        archive.writestr("../../evil.txt", "x")
    assert bundles.read_bundle(tmp_path / "b.zip") == bundles.read_bundle(small)
    assert not list(tmp_path.parent.glob("evil*"))


def replaced(name, old, new):
    def damage(directory):
        text = (directory / name).read_text()
        assert old in text
        (directory / name).write_text(text.replace(old, new, 1))

    return damage


MC = "eval_data/mc.jsonl"
DAMAGES = {
    "a broken line": (replaced(MC, '"Question 2:", "choices"', '"Question 2:" "choices"'), r"mc\.jsonl, line 3: Exp"),
    "a missing key": (replaced(MC, '"gold": 1', '"silver": 1'), r"mc\.jsonl, line 2: no 'gold'"),
    "an answer that is none of the choices": (replaced(MC, '"gold": 2', '"gold": 3'), r"mc\.jsonl, line 3: gold is no"),
    "a number for a text": (replaced(MC, '"Question 0:"', "7"), r"mc\.jsonl, line 1: query is not a text"),
    "a list for a row": (replaced(MC, "{", "[{"), r"mc\.jsonl, line 1: "),
    "deep nesting": (replaced(MC, "{", "[" * 100_000), r"mc\.jsonl, line 1: "),
    "choices in no list": (replaced(MC, '["import os 0", "import os", "no"]', '"no"'), "line 1: choices is not a"),
    "nothing to continue": (replaced("eval_data/lm.jsonl", "3 or so", " "), r"lm\.jsonl, line 4: nothing is to"),
    "too few rows": (replaced("core.yaml", "[3]", "[12]"), r"mc\.jsonl: given 12 rows"),
    "YAML that is none": (replaced("core.yaml", "-", "{"), r"core\.yaml cannot be read"),
    "deep YAML": (replaced("core.yaml", "icl_tasks:", "x: " + "[" * 20_000), r"core\.yaml cannot be read"),
    "a tag that runs code": (
        replaced("core.yaml", "label: mc", "label: !!python/object/apply:os.getcwd []"), r"core\.yaml cannot be read",
    ),
    "an unknown kind": (replaced("core.yaml", "multiple_choice", "guessing"), "icl_task_type is not one of"),
    "no baseline": (replaced("eval_meta_data.csv", "mc,", "m,"), "from 0 to below 100 for mc"),
    "a baseline of nothing": (replaced("eval_meta_data.csv", "mc,25", "mc,"), r"eval_meta_data\.csv cannot be read"),
    "a file elsewhere": (replaced("core.yaml", "mc.jsonl", "../../secret.jsonl"), "lies outside the bundle"),
    "no core.yaml": (lambda directory: (directory / "core.yaml").unlink(), r"core\.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_bundle_is_an_error_that_says_where(name, small):
    damage, words = DAMAGES[name]
    (small.parent / "secret.jsonl").write_text(json.dumps(choice(0)))
    damage(small)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        bundles.read_bundle(small)
    assert len(str(caught.value)) < 1000


def test_a_link_out_of_the_bundle_is_not_followed(small):
    shutil.move(small / MC, small.parent / "mc.jsonl")
    (small / MC).symlink_to(small.parent / "mc.jsonl")
    with pytest.raises(ValueError, match="lies outside"):
        bundles.read_bundle(small)


def test_a_zip_bomb_is_not_unpacked(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "LARGEST", 2**16)
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in small.rglob("*.*"):
            if path.name != "lm.jsonl":
                archive.write(path, str(path.relative_to(small)))
        with archive.open("eval_data/lm.jsonl", "w") as member:
            member.write(b" " * 2**24)
    with pytest.raises(ValueError, match=r"lm\.jsonl makes it more than [\d,]+ bytes"):
        bundles.read_bundle(tmp_path / "b.zip")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", "half"])
def test_a_damaged_zip_is_named(small, tmp_path, content):
    path = tmp_path / "b.zip"
    if content == "half":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in small.rglob("*.*"):
                archive.write(file, str(file.relative_to(small)))
        data = bytearray(path.read_bytes())
        data[40:120] = bytes(80)
        content = bytes(data)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.zip"):
        bundles.read_bundle(path)


@pytest.fixture
def saved(tiny_home, tokenizer):
    """A run whose checkpoint is a model of random weights."""
    config = load_config("configs/laptop.toml", [*TINY, "--model.vocab_size=512", "--model.sequence_len=256"])
    run_dir = tiny_home / "runs" / "moved"
    start_run(run_dir, config, tokenizer)
    saver = Saver(run_dir, config, tokenizer, report=lambda line: None)
    model = moved_model(sequence_len=256)
    saver.save(7, model.state_dict(), {}, {})
    saver.finish()
    return run_dir


def test_processes_share_the_rows_and_come_to_the_same_result(saved, small, tiny_home, tokenizer):
    result = launch(2, "moved", "--eval", "core", "--bundle", str(small), home=tiny_home, script="scripts.base_eval")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("mean centered over 0 of 22 tasks and 3 others") == 1
    report = read_reports(saved, 7)["core"]
    assert report["processes"] == 2 and report["missing"] == bundles.TASKS
    model = moved_model(sequence_len=256)
    assert report["correct"] == expected(model, tokenizer, small)
    assert report["scores"]["mc"]["examples"] == 12 and "core" not in report
    assert not list((saved / "evals").glob(".*"))


def test_an_interrupted_evaluation_goes_on_after_the_last_finished_task(tokenizer, small):
    class Interrupted(Exception):
        pass

    model, kept = moved_model(), {}

    def stop_after_two(label, result):
        kept[label] = result
        if len(kept) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        evaluate_core(model, tokenizer, small, on_task=stop_after_two)
    new = {}
    found = evaluate_core(model, tokenizer, small, finished=kept, on_task=new.__setitem__)
    assert new.keys() == {"lm"} and decisions(found) == expected(model, tokenizer, small)
    evaluate_core(model, tokenizer, small, 8, finished=kept, on_task=new.__setitem__)
    assert new.keys() == set(SMALL)  # cut to fewer rows, what was kept does not hold


def test_the_script_says_what_is_wrong_in_a_line(saved, small, tiny_home):
    result = call("base_eval", "moved", "--eval", "core", "--bundle", small, "--max-per-task", 3, home=tiny_home)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "given 3 rows, expected more than its 3 shots" in result.stderr


def test_a_cut_to_nothing_and_a_bundle_that_is_not_there_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match="max_per_task: given 0"):
        bundles.read_bundle(small, 0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        bundles.read_bundle(tmp_path / "nowhere")


def test_a_bundle_from_the_web_is_checked_and_kept(tiny_home, monkeypatch):
    with pytest.raises(OSError, match=r"cannot download http://127\.0\.0\.1:9/.*--bundle PATH"):
        monkeypatch.setattr(bundles, "URL", "http://127.0.0.1:9/eval_bundle.zip")
        monkeypatch.setattr(bundles.download, "__kwdefaults__", {**bundles.download.__kwdefaults__, "attempts": 1})
        bundles.fetch_bundle(report=lambda line: None)
    kept = home() / "core" / "eval_bundle.zip"
    kept.write_bytes(b"what was fetched before")
    monkeypatch.setattr(bundles, "SHA256", sha256(kept))
    assert bundles.fetch_bundle() == kept
