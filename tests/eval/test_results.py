"""Results that are written are read as they are, and name the checkpoint, machine and command they come from."""

import json

import pytest
import torch

from gkachat.eval.results import read_results, task_score, write_result

META = {"step": 300, "sha256": {"model.safetensors": "ab12"}, "version": "f00"}
CPU = torch.device("cpu")
SCORES = {
    "arc_easy": {**task_score(0.4, 500, 3.25, baseline=0.25), "correct": [True, False] * 250},
    "lambada": task_score(0.1, 400, 1.0),
}


def test_a_score_has_its_standard_error_and_is_centered_on_guessing():
    score = task_score(0.4, 600, 1.0, baseline=0.25)
    assert score["standard_error"] == pytest.approx(0.02) and score["centered"] == pytest.approx(0.2)
    assert task_score(0.4, 600, 1.0)["centered"] is None


def test_a_result_holds_scores_figures_checkpoint_machine_and_command(tmp_path):
    path = write_result(tmp_path, "core", META, CPU, SCORES, mean_centered=0.2, tasks="2 of 22", long=[True] * 500)
    assert {path.name for path in (tmp_path / "evals").iterdir()} == {"core_step_000300.json", "core_step_000300.md"}
    result = read_results(tmp_path, 300)["core"]
    assert result == json.loads(path.read_text())
    assert result["checkpoint_sha256"] == "ab12" and result["mean_centered"] == 0.2 and result["scores"] == SCORES
    assert {"processor", "date", "commit", "torch"} <= result["facts"].keys()
    assert result["command"].startswith("python -m scripts.")
    text = path.with_suffix(".md").read_text()
    assert "| arc_easy | 0.4000 | 0.0219 | 0.2000 | 500 | 3.2 |" in text
    assert "| lambada | 0.1000 | 0.0150 |  | 400 | 1.0 |" in text
    assert "- tasks: 2 of 22" in text and "- commit: " in text and "long" not in text


def test_the_report_has_no_python(tmp_path):
    figures = {"limit": None, "tuned": True, "ignored": [], "names": ["a", "b"], "metrics": {"t": {"acc": 0.5}}}
    text = write_result(tmp_path, "lm_eval", META, CPU, **figures).with_suffix(".md").read_text()
    for line in ("- limit: none", "- tuned: yes", "- ignored: none", "- names: a, b", "- metrics: t acc 0.5"):
        assert f"{line}\n" in text


def test_results_are_read_by_step_and_kind_and_a_damaged_one_is_named(tmp_path):
    path = write_result(tmp_path, "core", META, CPU, SCORES)
    write_result(tmp_path, "bpb", META, CPU, val_bpb=1.5)
    write_result(tmp_path, "core", META | {"step": 400}, CPU)
    assert read_results(tmp_path, 300).keys() == {"core", "bpb"}
    assert read_results(tmp_path, 400).keys() == {"core"} and not read_results(tmp_path, 500)
    path.write_text('{"kind": "core"')
    with pytest.raises(ValueError, match=r"core_step_000300\.json cannot be read"):
        read_results(tmp_path, 300)
