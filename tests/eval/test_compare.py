"""The comparison of runs: what it reads, computes and writes."""

import json
import shutil

import pytest
from conftest import TINY, run_ranks, run_script, wandb_runs

from gkachat.checkpoint import open_checkpoint
from gkachat.config_file import load_config
from gkachat.eval import compare as comparisons
from gkachat.eval.compare import compare_runs, markdown
from gkachat.eval.results import read_results, task_score, write_result
from gkachat.machine import pick_device
from gkachat.model.stats import model_stats
from scripts import base_eval, compare


@pytest.fixture(scope="module")
def finished(corpus_home, tmp_path_factory):
    """A GKACHAT_HOME with a trained and evaluated run of each attention."""
    home = tmp_path_factory.mktemp("finished")
    for name in ("tokenizer", "tokens"):
        (home / name).symlink_to(corpus_home / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GKACHAT_HOME", str(home))
        for attention in ("softmax", "gka"):
            options = [*TINY, f"--model.attention={attention}", "--train.device_batch_size=auto"]
            result = run_script("base_train", "configs/laptop.toml", *options, home=home)
            assert result.returncode == 0, result.stderr
            base_eval.main(f"d2_{attention}")
    return home


@pytest.fixture
def runs(finished, tiny_home):
    shutil.copytree(finished / "runs", tiny_home / "runs")
    return [tiny_home / "runs" / name for name in ("d2_softmax", "d2_gka")]


def change_bpb(run_dir, **figures):
    path = run_dir / "evals" / "bpb_step_000008.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | figures))


def test_the_table_holds_the_counted_figures_and_their_ratios(runs):
    table = compare_runs(runs)["table"]
    stats = [model_stats(load_config(run_dir / "config.toml").model) for run_dir in runs]
    params, flops = table["parameters"], table["training FLOPs"]
    assert params["values"] == [s.params["total"] for s in stats] and params["published_ratio"] is None
    assert params["ratios"] == [pytest.approx(params["values"][1] / params["values"][0])]
    assert flops["values"] == [2048 * s.flops_per_token for s in stats] and flops["published_ratio"] is None
    assert table["training tokens"]["values"] == [2048, 2048]
    bpb = [read_results(run_dir, 8)["bpb"] for run_dir in runs]
    assert table["val bits per byte"]["values"] == [figures["val_bpb"] for figures in bpb]
    gap = bpb[1]["val_bpb"] - bpb[1]["train_bpb"]
    assert table["val - train gap"]["values"][1] == pytest.approx(gap)
    assert table["unigram bits per byte, val"]["ratios"] == [1.0]
    assert table["training tokens a second"]["values"][0] > 0


def test_batches_that_differ_are_said(runs):
    comparison = compare_runs(runs)
    assert comparison["table"]["tokens a step"] == {"values": [256, 256], "ratios": [1.0], "published_ratio": None}
    assert "differ in their batches" not in markdown(comparison)
    comparison["table"]["tokens a step"]["values"][1] = 512
    assert "differ in their batches" in markdown(comparison)


def test_curves_and_bandwidths_come_from_the_runs(runs):
    comparison = compare_runs(runs)
    assert [point["tokens"] for point in comparison["curves"]["d2_gka"]] == [0, 1024, 2048]
    assert list(comparison["sigma"]) == ["d2_gka"]
    sigma = comparison["sigma"]["d2_gka"]
    assert len(sigma) == 2 and all(len(heads) == 2 for heads in sigma)
    assert all(1 < value < 6 for heads in sigma for value in heads)  # near sqrt(16 / 2) after eight steps


def test_a_run_compared_with_itself_has_ratios_of_one(runs):
    comparison = compare_runs([runs[0], runs[0]])
    ratios = {ratio for row in comparison["table"].values() for ratio in row["ratios"] if ratio is not None}
    assert ratios == {1.0} and comparison["names"] == ["d2_softmax (a)", "d2_softmax (b)"]


def test_every_later_run_is_compared_with_the_first(runs):
    softmax, gka = runs
    shutil.copytree(gka, third := gka.with_name("third"))
    for run_dir, answers in ((softmax, [True, False]), (gka, [True, True]), (third, [False, False])):
        write_scores(run_dir, {"arc": answers})
    comparison = compare_runs([softmax, gka, third])
    ratios = comparison["table"]["parameters"]["ratios"]
    assert ratios[0] == ratios[1] < 1
    assert [(s["run"], s["a"], s["b"]) for s in comparison["scores"]] == [("d2_gka", 0.5, 1.0), ("third", 0.5, 0.0)]
    table = markdown(comparison)
    assert "|  | d2_softmax | d2_gka | third | d2_gka over d2_softmax | third over d2_softmax |\n" in table
    assert {line.count("|") for line in table.splitlines()[:12]} == {7}


def test_published_ratios_stand_beside_gka_over_softmax_at_depth_20_only(runs, monkeypatch):
    assert "ublished" not in markdown(compare_runs(runs))
    depth, real = 20, comparisons.read_run

    def read_run(run_dir):
        run = real(run_dir)
        run["facts"]["depth"] = depth
        return run

    monkeypatch.setattr(comparisons, "read_run", read_run)
    comparison = compare_runs(runs)
    published = {row: figures["published_ratio"] for row, figures in comparison["table"].items()}
    assert (published["parameters"], published["training FLOPs"], published["tokens a step"]) == (0.42, 0.49, None)
    assert " published |" in markdown(comparison) and "Published: gka over softmax at depth 20" in markdown(comparison)
    assert "ublished" not in markdown(compare_runs(runs[::-1])) + markdown(compare_runs([runs[0], runs[0]]))
    depth = 12
    assert "ublished" not in markdown(compare_runs(runs))


def test_runs_that_cannot_be_compared_are_refused(runs):
    with pytest.raises(ValueError, match="runs to compare: given 1"):
        compare_runs(runs[:1])
    change_bpb(runs[1], val_sha256=["0"])
    with pytest.raises(ValueError, match="different val texts"):
        compare_runs(runs)
    (runs[1] / "evals" / "bpb_step_000008.json").rename(runs[1] / "evals" / "bpb_step_000004.json")
    with pytest.raises(FileNotFoundError, match=r"not evaluated at its last checkpoint.*scripts\.base_eval d2_gka"):
        compare_runs(runs)


def test_an_image_run_is_named_and_not_sent_to_be_evaluated(runs):
    path = runs[1] / "checkpoints" / "step_000008" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_sha256": ""}))
    with pytest.raises(ValueError, match=r"d2_gka: given an image model, expected .*scripts\.vision_report compares"):
        compare_runs(runs)


def test_the_same_evaluation_is_not_done_twice_unless_code_checkpoint_or_text_changed(runs, tiny_home, monkeypatch):
    def evaluate(commit="abc", *options):
        for module in ("eval.results", "benchmark"):
            monkeypatch.setattr(f"gkachat.{module}.commit", lambda: commit)
        result = run_script("base_eval", "d2_gka", *options, home=tiny_home)
        assert (result.returncode == 0 and "val_bpb" in result.stdout) or "unigram " in result.stdout, result.stderr
        return "has this evaluation already" not in result.stdout

    assert [evaluate(), evaluate(), evaluate("def")] == [True, False, True]
    assert evaluate("def-dirty") and evaluate("def-dirty") and evaluate("def", "--step=8") and evaluate("def")
    assert not evaluate("def")
    change_bpb(runs[1], val_sha256=["of another text"])
    assert evaluate("def")
    change_bpb(runs[1], checkpoint_sha256="of another checkpoint")
    assert evaluate("def")


def test_bits_per_byte_cover_all_of_val_and_are_printed_beside_the_unigram_model(runs, tiny_home, capsys):
    before = read_results(runs[1], 8)["bpb"]
    manifest = json.loads((tiny_home / "tokens" / "python-source-v512" / "manifest.json").read_text())
    assert before["val_tokens"] == sum(shard["tokens"] for shard in manifest["shards"] if shard["split"] == "val")
    assert before["val_bpb"] != before["train_bpb"] and 2 < before["unigram_bpb"] < 8
    (runs[1] / "evals" / "bpb_step_000008.json").unlink()
    base_eval.main("d2_gka")
    printed = capsys.readouterr().out
    assert f"{before['unigram_bpb']:.4f}" in printed and f"{before['val_bpb']:.4f}" in printed


def test_two_processes_measure_what_one_does_each_on_its_share(runs, tiny_home):
    alone = read_results(runs[1], 8)["bpb"]
    (runs[1] / "evals" / "bpb_step_000008.json").unlink()
    result = run_ranks(2, "base_eval", "d2_gka", home=tiny_home)
    assert result.returncode == 0 and result.stdout.count("unigram") == 1, result.stderr
    together = read_results(runs[1], 8)["bpb"]
    for name in ("val_bpb", "train_bpb"):  # sums in float64, added in another order
        assert together[name] == pytest.approx(alone[name], rel=1e-12)
    assert together["unigram_bpb"] == alone["unigram_bpb"] and together["val_sha256"] == alone["val_sha256"]


def write_scores(run_dir, answers, *, kind="core", rows="same", **figures):
    """Write a result with {task: list of right or wrong}."""
    scores = {
        task: {**task_score(sum(right) / len(right), len(right), 1.0, 0.0), "correct": right, "sha256": rows}
        for task, right in answers.items()
    }
    write_result(run_dir, kind, open_checkpoint(run_dir)[1], pick_device("cpu"), scores, **figures)


FIRST = [i % 2 == 0 for i in range(100)]
BETTER = [right or i < 12 for i, right in enumerate(FIRST)]  # six rows more, none less


def test_scores_are_compared_pair_by_pair_on_the_same_rows_and_as_two_samples_on_others(runs):
    for run_dir, answers in zip(runs, (FIRST, BETTER), strict=True):
        write_scores(run_dir, {"arc": answers}, name="n of 22", mean_centered=sum(answers) / 100)
    comparison = compare_runs(runs)
    arc, mean = comparison["scores"]
    assert (arc["name"], arc["a"], arc["b"], arc["paired"]) == ("core: arc", 0.5, 0.56, True)
    assert arc["error"] == pytest.approx((0.06 * 0.94 / 100) ** 0.5) and not arc["is_noise"]
    assert mean["name"] == "core: n of 22" and mean["error"] == pytest.approx(arc["error"]) and mean["paired"]
    line = "| core: arc | 100 | 0.5000 ± 0.0500 | 0.5600 ± 0.0496 | +0.0600 ± 0.0237 | more than noise, paired |"
    assert line in markdown(comparison)
    write_scores(runs[1], {"arc": BETTER}, rows="others")
    (arc,) = compare_runs(runs)["scores"]
    assert arc["examples"] == [100, 100]
    assert not arc["paired"] and arc["is_noise"]
    assert arc["error"] == pytest.approx((0.25 / 100 + 0.56 * 0.44 / 100) ** 0.5)


def test_only_tasks_that_both_runs_have_are_compared_and_means_only_by_name(runs):
    write_scores(runs[0], {"arc": [True, False], "copa": [True]}, kind="chat", mean_centered=0.1)
    write_scores(runs[1], {"arc": [True, True], "piqa": [True]}, kind="chat", mean_centered=0.2)
    write_scores(runs[1], {"gsm8k": [False]}, kind="lm_eval")
    assert [score["name"] for score in compare_runs(runs)["scores"]] == ["chat: arc"]


def test_a_score_on_fewer_examples_shows_their_number_and_never_replaces_one_on_more(runs):
    write_scores(runs[0], {"arc": [True] * 4}, kind="chat")
    write_scores(runs[1], {"arc": [True] * 3}, kind="chat", rows="others")
    assert "| chat: arc | 4 and 3 | 1.0000 ± 0.0000 |" in markdown(compare_runs(runs))
    write_scores(runs[0], {"arc": [False] * 3}, kind="chat")
    [arc] = compare_runs(runs)["scores"]
    assert (arc["a"], arc["examples"]) == (1.0, [4, 3])


def test_the_script_prints_the_table_writes_files_and_sends_them_to_weights_and_biases(
    runs, tiny_home, monkeypatch, capsys
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    compare.main(("d2_softmax", "d2_gka"), wandb="tests")
    printed, out = capsys.readouterr().out, tiny_home / "comparisons" / "d2_softmax-d2_gka"
    comparison = compare_runs(runs)
    assert markdown(comparison) in printed and str(out) in printed
    assert json.loads((out / "comparison.json").read_text()) == comparison
    note = (out / "comparison.md").read_text().removeprefix(markdown(comparison))
    assert "commit" in note and note.count("\n") == 1
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")

    [sent] = wandb_runs(out)
    assert (sent.project, sent.name) == ("tests", "d2_softmax-d2_gka")
    [artifact] = [a for a in sent.artifacts if a.type == "comparison"]
    paths = {entry.path for entry in artifact.manifest.contents}
    assert paths == {"comparison.md", "comparison.json", "comparison.png"}
    [items] = sent.history
    table = json.loads((sent.files / items["table/path"]).read_text())
    assert table["columns"] == ["", "d2_softmax", "d2_gka", "d2_gka over d2_softmax"]
    [params] = [row for row in table["data"] if row[0] == "parameters"]
    stored = comparison["table"]["parameters"]
    assert params[1:] == [*stored["values"], *stored["ratios"]]
    assert (sent.files / items["comparison/path"]).read_bytes() == (out / "comparison.png").read_bytes()
