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
    assert task_score(0.4, 600, 1.0)["centered"] is None is task_score(1.0, 1, 1.0, baseline=1.0)["centered"]


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


def scored(**examples):
    return {task: task_score(1.0, n, 1.0) for task, n in examples.items()}


def test_a_report_replaces_those_that_it_covers_and_stands_beside_others(tmp_path):
    def write(scores, kind="chat", sha="ab12", **figures):
        meta = META | {"sha256": {"model.safetensors": sha}}
        return write_result(tmp_path, kind, meta, CPU, scores, **figures).name.partition("_step_")[0]

    def there():
        return sorted(path.name.partition("_step_")[0] for path in (tmp_path / "evals").glob("*.*"))

    assert write(scored(a=3)) == "chat" and write(scored(a=100, b=100)) == "chat" == write(scored(a=100, b=100))
    assert write(scored(a=5)) == "chat_2" == write(scored(a=7)) and write(scored(b=9)) == "chat_3"
    assert there() == ["chat"] * 2 + ["chat_2"] * 2 + ["chat_3"] * 2
    found = read_results(tmp_path, 300)["chat"]
    assert found["examples"] == 200 and {s["examples"] for s in found["scores"].values()} == {100}
    assert write(scored(a=100, b=100, c=1)) == "chat" and there() == ["chat"] * 2
    assert "- examples: 201\n" in (tmp_path / "evals" / "chat_step_000300.md").read_text()
    assert write(scored(a=1), sha="other weights") == "chat" and there() == ["chat"] * 2

    assert write({}, "lm_eval", metrics={"pages": {"bpb": 1.0, "examples": 4}}) == "lm_eval"
    assert write(scored(arc=9), "lm_eval") == "lm_eval_2"  # other tasks
    assert read_results(tmp_path, 300)["lm_eval"]["scores"].keys() == {"arc"}
    (tmp_path / "evals" / "chat_step_000300.json").write_text("{")
    assert write(scored(a=1)) == "chat"  # a damaged one is worth nothing


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
