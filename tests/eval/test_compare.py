"""The comparison of runs: what it reads, computes and writes."""

import json
import shutil

import pytest
from conftest import TINY, call, wandb_runs

from gkachat.checkpoint import find_run, open_checkpoint
from gkachat.config_file import load_config
from gkachat.eval.compare import compare_runs, markdown, write_comparison
from gkachat.eval.report import Score, write_report
from gkachat.model.stats import model_stats
from scripts.compare import main


@pytest.fixture(scope="module")
def finished(corpus_home, tmp_path_factory):
    """A home with a trained and evaluated run of each attention."""
    home = tmp_path_factory.mktemp("finished")
    for name in ("tokenizer", "tokens"):
        (home / name).symlink_to(corpus_home / name)
    for attention in ("softmax", "gka"):
        options = [*TINY, f"--model.attention={attention}", "--train.device_batch_size=auto"]
        for args in (("base_train", "configs/laptop.toml", *options), ("base_eval", f"d2_{attention}")):
            result = call(*args, home=home)
            assert result.returncode == 0, result.stderr
    return home


@pytest.fixture
def evaluated(finished, tiny_home):
    shutil.copytree(finished / "runs", tiny_home / "runs")
    return [tiny_home / "runs" / name for name in ("d2_softmax", "d2_gka")]


def test_the_table_holds_the_counted_figures_and_their_ratios(evaluated):
    comparison = compare_runs(*evaluated)
    rows = {row.name: row for row in comparison.rows}
    counted = [model_stats(load_config(d / "config.toml").model) for d in evaluated]
    params = rows["parameters"]
    assert params.values == tuple(c.params["total"] for c in counted)
    assert params.ratios == [pytest.approx(params.values[1] / params.values[0])] and params.published == 0.42
    flops = rows["training FLOPs"]
    assert flops.values == tuple(2048 * c.flops_per_token for c in counted) and flops.published == 0.49
    assert rows["training tokens"].values == (2048, 2048)
    stored = [json.loads((d / "eval.json").read_text()) for d in evaluated]
    assert rows["val bits per byte"].values == tuple(s["val_bpb"] for s in stored)
    assert rows["val - train gap"].values[1] == pytest.approx(stored[1]["val_bpb"] - stored[1]["train_bpb"])
    assert rows["unigram bits per byte, val"].ratios == [1.0]
    assert rows["training tokens a second"].values[0] > 0


def test_curves_and_bandwidths_come_from_the_runs(evaluated):
    comparison = compare_runs(*evaluated)
    assert [point["tokens"] for point in comparison.curves["d2_gka"]] == [0, 1024, 2048]
    assert list(comparison.sigma) == ["d2_gka"]
    sigma = comparison.sigma["d2_gka"]
    assert len(sigma) == 2 and all(len(heads) == 2 for heads in sigma)
    assert all(1 < value < 6 for heads in sigma for value in heads)  # near sqrt(16 / 2) after eight steps


def test_everything_is_written_and_says_the_same(evaluated, tmp_path):
    comparison = compare_runs(*evaluated)
    write_comparison(comparison, tmp_path / "out", "- a note\n")
    written = {p.name: p for p in (tmp_path / "out").iterdir()}
    assert set(written) == {"comparison.md", "comparison.json", "comparison.png"}
    assert written["comparison.md"].read_text() == markdown(comparison) + "- a note\n"
    table = json.loads(written["comparison.json"].read_text())["table"]
    assert table["parameters"]["ratios"] == comparison.rows[0].ratios
    assert written["comparison.png"].read_bytes().startswith(b"\x89PNG")


def test_a_run_compared_with_itself_has_ratios_of_one(evaluated):
    comparison = compare_runs(evaluated[0], evaluated[0])
    assert {ratio for row in comparison.rows for ratio in row.ratios if ratio is not None} == {1.0}
    assert comparison.names == ("d2_softmax (a)", "d2_softmax (b)")


def test_more_than_two_are_each_compared_with_the_first(evaluated):
    softmax, gka = evaluated
    shutil.copytree(gka, third := gka.with_name("third"))
    for run, answers in ((softmax, [True, False]), (gka, [True, True]), (third, [False, False])):
        with_scores(run, {"arc": answers})
    comparison = compare_runs(softmax, gka, third)
    assert comparison.rows[0].ratios[0] == comparison.rows[0].ratios[1] < 1
    assert [(d.run, d.a, d.b) for d in comparison.scores] == [("d2_gka", 0.5, 1.0), ("third", 0.5, 0.0)]
    table = markdown(comparison)
    assert "| | d2_softmax | d2_gka | third | d2_gka over d2_softmax | third over d2_softmax | published |" in table
    assert {line.count("|") for line in table.splitlines()[:12]} == {8}


def test_one_run_is_nothing_to_compare(evaluated, tiny_home):
    assert "given 1 run to compare" in call("compare", "d2_softmax", home=tiny_home).stderr


def test_a_run_that_was_not_evaluated_is_named(evaluated):
    (evaluated[0] / "eval.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"scripts\.base_eval d2_softmax"):
        compare_runs(*evaluated)


def test_an_evaluation_of_another_step_is_refused(evaluated):
    path = evaluated[1] / "eval.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 3}))
    with pytest.raises(ValueError, match="has trained on since it was evaluated"):
        compare_runs(*evaluated)


def test_runs_on_different_val_texts_are_not_compared(evaluated):
    path = evaluated[1] / "eval.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"val_sha256": ["0"]}))
    with pytest.raises(ValueError, match="different val texts"):
        compare_runs(*evaluated)


def test_the_script_prints_the_table_and_where_it_was_written(evaluated, tiny_home):
    result = call("compare", "d2_softmax", "d2_gka", home=tiny_home)
    assert result.returncode == 0, result.stderr
    assert markdown(compare_runs(*evaluated)) in result.stdout
    out = tiny_home / "comparisons" / "d2_softmax-d2_gka"
    assert str(out) in result.stdout
    assert "commit" in (out / "comparison.md").read_text()


def test_evaluation_prints_the_unigram_figure_and_covers_all_of_val(evaluated, tiny_home):
    stored = json.loads((find_run("d2_gka") / "eval.json").read_text())
    manifest = json.loads((tiny_home / "tokens" / "python-source-v512" / "manifest.json").read_text())
    assert stored["val_tokens"] == sum(s["tokens"] for s in manifest["shards"] if s["split"] == "val")
    assert 2 < stored["unigram_bpb"] < 8
    assert f"{stored['unigram_bpb']:.4f}" in call("base_eval", "d2_gka", home=tiny_home).stdout


def with_scores(run_dir, answers, *, kind="core", rows="same", **facts):
    """Leave a report: {task: list of right or wrong}."""
    scores = {}
    for task, right in answers.items():
        p = sum(right) / len(right)
        scores[task] = Score(p, (p * (1 - p) / len(right)) ** 0.5, len(right), 1.0, centered=p)
    facts = {"correct": answers, "sha256": dict.fromkeys(answers, rows), **facts}
    write_report(run_dir, kind, open_checkpoint(run_dir)[1], scores, **facts)


def test_scores_on_the_same_rows_are_compared_pair_by_pair(evaluated):
    first = [i % 2 == 0 for i in range(100)]
    better = [right or i < 12 for i, right in enumerate(first)]  # six rows more, none less
    for run, answers in zip(evaluated, (first, better), strict=True):
        with_scores(run, {"arc": answers}, name="n of 22", mean_centered=sum(answers) / 100)
    arc, mean = compare_runs(*evaluated).scores
    assert (arc.name, arc.a, arc.b, arc.paired) == ("core: arc", 0.5, 0.56, True)
    assert arc.error == pytest.approx((0.06 * 0.94 / 100) ** 0.5) and not arc.is_noise
    assert mean.name == "core: n of 22" and mean.error == pytest.approx(arc.error) and mean.paired
    assert "| core: arc | 0.5000 ± 0.0500 | 0.5600 ± 0.0496 | +0.0600 ± 0.0237 | more than noise, paired |" in markdown(
        compare_runs(*evaluated)
    )


def test_scores_on_other_rows_are_two_samples(evaluated):
    first = [i % 2 == 0 for i in range(100)]
    better = [right or i < 12 for i, right in enumerate(first)]
    for run, answers, rows in zip(evaluated, (first, better), ("these", "those"), strict=True):
        with_scores(run, {"arc": answers}, rows=rows)
    (arc,) = compare_runs(*evaluated).scores
    assert not arc.paired and arc.error == pytest.approx((0.25 / 100 + 0.56 * 0.44 / 100) ** 0.5) and arc.is_noise


def test_only_what_both_runs_were_measured_on_is_compared(evaluated, tmp_path):
    with_scores(evaluated[0], {"arc": [True, False], "copa": [True]})
    with_scores(evaluated[1], {"arc": [True, True], "piqa": [True]})
    with_scores(evaluated[1], {"gsm8k": [False]}, kind="chat")
    comparison = compare_runs(*evaluated)
    assert [score.name for score in comparison.scores] == ["core: arc"]
    write_comparison(comparison, tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text())["scores"][0]["is_noise"]


def test_chat_benchmarks_of_two_tuned_runs_are_compared(evaluated):
    """They have a mean over the tasks that were asked, and no name for it."""
    for run, accuracy in zip(evaluated, (0.9, 0.2), strict=True):
        meta = open_checkpoint(run)[1]
        write_report(run, "chat", meta, {"addition": Score(accuracy, 0.03, 200, 1.0, 0.1)}, mean_centered=0.1)
    [addition] = compare_runs(*evaluated).scores
    assert (addition.name, addition.a, addition.b, addition.is_noise) == ("chat: addition", 0.9, 0.2, False)


def test_a_comparison_becomes_an_artefact_of_weights_and_biases(evaluated, tiny_home, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    main(("d2_softmax", "d2_gka"), out=str(tmp_path / "out"), wandb="tests")
    [told] = wandb_runs(tmp_path / "out")
    assert (told.project, told.name) == ("tests", "d2_softmax-d2_gka")
    [artifact] = [a for a in told.artifacts if a.type == "comparison"]
    assert artifact.name == "comparison-d2_softmax-d2_gka"
    paths = {entry.path for entry in artifact.manifest.contents}
    assert paths == {"comparison.md", "comparison.json", "comparison.png"}
    [items] = told.history
    table = json.loads((told.files / items["table/path"]).read_text())
    assert table["columns"] == ["", "d2_softmax", "d2_gka", "d2_gka over d2_softmax", "published"]
    [params] = [row for row in table["data"] if row[0] == "parameters"]
    stored = json.loads((tmp_path / "out" / "comparison.json").read_text())["table"]["parameters"]
    assert params[1:4] == [*stored["values"], *stored["ratios"]]
    assert (told.files / items["comparison/path"]).read_bytes() == (tmp_path / "out" / "comparison.png").read_bytes()
