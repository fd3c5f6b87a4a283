"""What is written about an evaluation is what is read, and names the checkpoint it is about."""

import json

import pytest

from gkachat.eval.report import Score, read_reports, write_report

META = {"step": 300, "sha256": {"model.safetensors": "ab12"}, "version": "f00"}
SCORES = {"arc_easy": Score(0.4, 0.02, 500, 3.25, centered=0.2), "lambada": Score(0.1, 0.01, 400, 1.0)}


def test_a_report_holds_scores_facts_and_the_checkpoint(tmp_path):
    path = write_report(tmp_path, "core", META, SCORES, mean_centered=0.2, correct={"arc_easy": [True, False] * 250})
    assert path == tmp_path / "evals" / "core_step_000300.json"
    report = read_reports(tmp_path, 300)["core"]
    assert report == json.loads(path.read_text())
    assert report["checkpoint_sha256"] == "ab12" and report["mean_centered"] == 0.2
    assert len(report["correct"]["arc_easy"]) == 500 and {"python", "torch", "gkachat"} == report["versions"].keys()
    assert report["scores"]["arc_easy"] == {
        "accuracy": 0.4, "standard_error": 0.02, "examples": 500, "seconds": 3.25, "centered": 0.2,
    }  # fmt: skip
    assert {path.name for path in path.parent.iterdir()} == {"core_step_000300.json", "core_step_000300.md"}


def test_the_table_shows_every_task_and_leaves_long_lists_out(tmp_path):
    write_report(tmp_path, "core", META, SCORES, correct=[True] * 500, tasks="2 of 22")
    text = (tmp_path / "evals" / "core_step_000300.md").read_text()
    assert "| arc_easy | 0.4000 | 0.0200 | 0.2000 | 500 | 3.2 |" in text
    assert "| lambada | 0.1000 | 0.0100 |  | 400 | 1.0 |" in text
    assert "- tasks: 2 of 22" in text and "correct" not in text


def test_reports_are_of_one_step_and_of_all_kinds(tmp_path):
    write_report(tmp_path, "core", META, SCORES)
    write_report(tmp_path, "bpb", META, {}, val_bpb=1.5)
    write_report(tmp_path, "core", META | {"step": 400}, {})
    assert read_reports(tmp_path, 300).keys() == {"core", "bpb"}
    assert read_reports(tmp_path, 400).keys() == {"core"} and not read_reports(tmp_path, 500)


def test_a_damaged_report_is_named(tmp_path):
    write_report(tmp_path, "core", META, SCORES).write_text('{"kind": "core"')
    with pytest.raises(ValueError, match=r"core_step_000300\.json cannot be read"):
        read_reports(tmp_path, 300)
