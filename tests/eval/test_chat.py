"""Addition and counting: the questions asked are those that tuning kept out, and answers are the model's own."""

import re

import pytest
import torch
from conftest import live_model, untrained_run

from gkachat.data.conversations import is_val, render_prompt
from gkachat.data.tasks import SCORED_TASKS, answer_of
from gkachat.eval import chat
from gkachat.eval.chat import evaluate_chat, generate_replies, held_out_questions
from gkachat.eval.results import read_results
from gkachat.tokenizer import train_tokenizer
from scripts import chat_eval


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["What is 12 + 34? How many a are in banana? The answer is 46. " * 20], 320)


@pytest.fixture(scope="module", params=["softmax", "gka"])
def model(request, tokenizer):
    return live_model(request.param, vocab_size=tokenizer.vocab_size, sequence_len=256)


def test_questions_are_always_the_same_ones_that_tuning_kept_out():
    for task in SCORED_TASKS:
        questions = held_out_questions(task, 0.05, 20)
        assert questions == held_out_questions(task, 0.05, 20) and len(questions) == 20
    for question, answer in held_out_questions("addition", 0.05, 50).values():
        a, b = map(int, re.findall(r"\d+", question))
        assert is_val(f"addition {a} {b}", 0.05) and answer == str(a + b)
    with pytest.raises(ValueError, match="tuning kept no question out"):
        held_out_questions("addition", 1e-9, 5)


def test_an_answer_is_what_follows_the_last_the_answer_is():
    assert answer_of("The answer is 1. No: 2 + 2 = 4. The answer is 4.") == "4"
    assert answer_of("It is 4.") == ""


@pytest.mark.parametrize("rows", [1, 4])
def test_replies_are_greedy_end_where_the_assistant_ends_and_come_in_order(model, tokenizer, rows, monkeypatch):
    monkeypatch.setattr(chat, "MAX_ANSWER_TOKENS", 12)
    texts, end, expected = ("What is it?", "Which?", "thing " * 9, "A"), tokenizer.special["<|assistant_end|>"], []
    for text in texts:
        ids, reply = render_prompt(tokenizer, [{"role": "user", "content": text}]), []
        while len(reply) < 12:
            with torch.no_grad():
                token = int(model(torch.tensor([ids + reply]))[0, -1].argmax())
            if token in (end, tokenizer.bos):
                break
            reply.append(token)
        expected.append(reply)
    assert generate_replies(model, tokenizer, texts, rows) == [tokenizer.decode(reply) for reply in expected]
    cut = max(map(expected[0].index, expected[0]))  # the last token that comes for the first time now ends the reply
    monkeypatch.setitem(tokenizer.special, "<|assistant_end|>", expected[0][cut])
    assert generate_replies(model, tokenizer, texts[:1], rows) == [tokenizer.decode(expected[0][:cut])]


def test_right_answers_are_counted_and_centered_on_guessing(model, tokenizer, monkeypatch):
    questions = held_out_questions("counting", 0.05, 20)
    answers = [answer for _, answer in questions.values()]
    replies = [f"The answer is {answer}." if i % 4 else "I cannot say." for i, answer in enumerate(answers)]
    monkeypatch.setattr(chat, "generate_replies", lambda *args: replies)
    score = evaluate_chat(model, tokenizer, ["counting"], val_fraction=0.05, limit=20)["counting"]
    assert score["correct"] == [i % 4 > 0 for i in range(20)] and score["accuracy"] == 0.75
    assert score["baseline"] == max(map(answers.count, answers)) / 20
    assert score["kinds"] == {"": {"correct": 15, "examples": 20}}
    assert score["centered"] == pytest.approx((0.75 - score["baseline"]) / (1 - score["baseline"]))


def test_additions_are_counted_by_the_digits_of_the_longer_number(model, tokenizer, monkeypatch):
    questions = held_out_questions("addition", 0.05)
    monkeypatch.setattr(chat, "generate_replies", lambda *args: [f"The answer is {a}." for _, a in questions.values()])
    kinds = evaluate_chat(model, tokenizer, ["addition"], val_fraction=0.05)["addition"]["kinds"]
    longest = [max(map(len, re.findall(r"\d+", question))) for question, _ in questions.values()]
    expected = {n: longest.count(n) for n in (1, 2, 3)}
    assert kinds == {f"{n} digit{'s' * (n > 1)}": {"correct": e, "examples": e} for n, e in expected.items()}
    assert min(expected.values()) > 0 and min(expected[2], expected[3]) > 50


def test_unknown_tasks_and_a_limit_of_nothing_are_refused(model, tokenizer):
    for tasks, limit, words in (
        (["chess"], 1, "tasks: given chess, expected some of addition, counting"),
        ([], 1, "tasks: given none"),
        (SCORED_TASKS, 0, "limit: given 0"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate_chat(model, tokenizer, tasks, val_fraction=0.05, limit=limit)


def test_the_script_asks_tuned_runs_only_and_writes_a_result(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(chat, "MAX_ANSWER_TOKENS", 8)
    monkeypatch.setenv("GKACHAT_HOME", str(tmp_path))
    untrained_run(tmp_path, "d1", tokenizer, sequence_len=128)
    with pytest.raises(ValueError, match="d1: given a run that was not tuned"):
        chat_eval.main("d1")
    run_dir = untrained_run(tmp_path, "d1_chat", tokenizer, tuned=True, sequence_len=128)
    chat_eval.main("d1_chat", limit=3)
    printed = capsys.readouterr().out
    assert "  addition  " in printed and "  counting  " in printed and "guessing: " in printed
    scores = read_results(run_dir, 1)["chat"]["scores"]
    assert {task: score["examples"] for task, score in scores.items()} == {"addition": 3, "counting": 3}
