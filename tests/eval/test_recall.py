"""Synthetic texts: whoever reads the past by the rules answers all of them, and the past alone has the answer."""

import json
import sys

import pytest
import torch

from gkachat.eval.recall import ASK, FIRST_VALUE, MARK, NOISE, TASKS, VOCAB_SIZE, check_shape
from scripts import recall as script

ROWS, LENGTH, PAIRS = 40, 48, 6


def answer(task, text):
    """Return what follows `text`, a list of ids, by the rules of the task."""
    last = text[-1]
    if task == "needle":  # sign, key, value: the value of this key behind the sign of the needle
        return next(text[i + 2] for i in range(len(text) - 2) if text[i : i + 2] == [MARK, last])
    if task == "copying":
        start = text.index(ASK)
        return [token for token in text[:start] if token != NOISE][len(text) - start - 1]
    if task == "recall":  # the first time that the key came
        return text[text.index(last) + 1]
    return text[len(text) - LENGTH // 2]


@pytest.mark.parametrize("task", TASKS)
def test_the_past_of_a_question_has_its_answer(task):
    idx, targets = TASKS[task](ROWS, LENGTH, PAIRS, torch.Generator().manual_seed(0))
    assert idx.shape == targets.shape == (ROWS, LENGTH) and idx.min() >= 0 and idx.max() < VOCAB_SIZE
    asked = {"induction": LENGTH // 2 - 1, "recall": PAIRS, "copying": PAIRS, "needle": 1}[task]
    assert ((targets != -1).sum(dim=1) == asked).all()
    for row, t in (targets != -1).nonzero().tolist():
        assert answer(task, idx[row, : t + 1].tolist()) == targets[row, t]
    again, other = (TASKS[task](ROWS, LENGTH, PAIRS, torch.Generator().manual_seed(seed))[0] for seed in (0, 1))
    assert torch.equal(idx, again) and not torch.equal(idx, other)


def test_a_needle_has_distractors_with_its_key_and_other_values():
    idx, targets = TASKS["needle"](ROWS, LENGTH, PAIRS, torch.Generator().manual_seed(0))
    key, value = idx[:, -2:-1], targets[targets != -1][:, None]
    followed = torch.where(idx[:, :-3] == key, idx[:, 1:-2], value)  # what follows each time that the key comes
    assert ((followed != value) & (followed >= FIRST_VALUE)).any(dim=1).float().mean() > 0.9


@pytest.mark.parametrize("task", TASKS)
def test_too_short_texts_are_refused(task):
    with pytest.raises(ValueError, match=rf"length: given 3, expected at least \d+ for {task} with 9 pairs"):
        check_shape(task, 3, 9)
    with pytest.raises(ValueError, match="pairs: given 63, expected 1 to 62"):
        check_shape(task, 1000, 63)


def test_the_script_goes_on_where_it_stopped_and_gka_conv_learns_what_gka_cannot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recall"])
    out, options = tmp_path / "r", {"lengths": (16,), "pairs": (2,), "steps": 120, "batch": 32, "channels": 32}
    script.main(tasks=("induction",), attentions=("gka_conv",), out=out, **options)
    first = json.loads(out.with_suffix(".json").read_text())["rows"]
    capsys.readouterr()
    script.main(tasks=("induction",), attentions=("gka", "gka_conv"), out=out, **options)
    said = capsys.readouterr().out
    assert "1/1 task induction, attention gka," in said and "attention gka_conv" not in said
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    accuracy = {row["attention"]: row["accuracy"] for row in rows}
    assert rows[:1] == first and accuracy["gka_conv"] > 0.8 > 0.4 > accuracy["gka"]
    assert "| induction | 16 |" in out.with_suffix(".md").read_text() and out.with_suffix(".png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"its runs have .* give another --out"):
        script.main(tasks=("induction",), out=out, **{**options, "steps": 3})


def test_every_task_is_drawn_and_has_a_line_for_each_shape(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recall"])
    script.main(attentions=("gka",), lengths=(24,), pairs=(2, 3), steps=2, batch=2, channels=32, out=tmp_path / "r")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [line.split("|")[1].strip() for line in lines] == sorted(["induction", *2 * ["copying", "needle", "recall"]])
    assert (tmp_path / "r.png").stat().st_size > 5000
