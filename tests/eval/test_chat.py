"""Benchmarks of tuned models, on rows of their columns."""

import json
import re
import sys
from decimal import Decimal

import pytest
import torch
from conftest import call, untrained_run

from gkachat.data.conversations import render_prompt
from gkachat.eval import chat
from gkachat.eval.chat import LETTERS, TASKS, choose, evaluate_chat, number_after_hashes, program, read_questions
from gkachat.eval.report import read_reports
from gkachat.model.gpt import GPT, GPTConfig
from gkachat.tokenizer import train_tokenizer

ADD = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """Add them.\n    >>> add(1, 2)\n    3\n    """\n',
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
    "entry_point": "add",
}


def arc(n):
    labels = ["1", "2", "3", "4"] if n % 3 == 0 else ["A", "B", "C"] if n % 3 == 1 else list("ABCDE")
    choices = {"text": [f"thing {i} of {n}" for i in range(len(labels))], "label": labels}
    return {"id": str(n), "question": f"Which thing is it, {n}?" * (1 + n % 4), "choices": choices,
        "answerKey": labels[n % len(labels)]}  # fmt: skip


ROWS = {
    "arc-easy": [arc(n) for n in range(15)],
    "arc-challenge": [arc(n) for n in range(15, 20)],
    "mmlu": [
        {"question": f"What is {n}?", "subject": "s", "choices": list("wxyz"), "answer": n % 4} for n in range(8)
    ],
    "gsm8k": [{"question": f"What is {n} and {n}?", "answer": f"<<{n}+{n}={2 * n}>>.\n#### {2 * n}"} for n in range(6)],
    "humaneval": [ADD],
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    for name, rows in ROWS.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Which thing is it? A. thing B. thing What is the number? " * 20], 320)


@pytest.fixture(scope="module", params=["softmax", "gka"])
def model(request, tokenizer):
    torch.manual_seed(1)
    config = GPTConfig(
        depth=2,
        attention=request.param,
        vocab_size=tokenizer.vocab_size,
        sequence_len=256,
        n_embd=32,
        head_dim=16,
        window_pattern="SL",
    )
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


def ask(tokenizer, text):
    return render_prompt(tokenizer, [{"role": "user", "content": text}])


def test_choices_are_lines_with_letters_whatever_they_were_called(data):
    texts = {q.text: q for q in read_questions("arc-easy", data)}
    row = ROWS["arc-easy"][3]
    lines = [f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"]["text"], strict=True)]
    question = texts["\n".join([row["question"], *lines])]
    assert (question.choices, question.gold) == (4, 3)
    assert {q.choices for q in texts.values()} == {3, 4, 5}


@torch.no_grad()
def test_the_likeliest_letter_is_chosen_among_those_there_are(model, tokenizer, data, monkeypatch):
    """Batched, padded and with a cache against one forward pass each."""
    monkeypatch.setitem(chat.TOKENS, "cpu", 500)  # several batches
    questions = read_questions("arc-easy", data)
    prompts = [ask(tokenizer, q.text) for q in questions]
    assert len({*map(len, prompts)}) > 3
    letters = [tokenizer.encode(letter) for letter in LETTERS]
    assert all(len(ids) == 1 for ids in letters)
    expected = []
    for ids, q in zip(prompts, questions, strict=True):
        logits = model(torch.tensor([ids]))[0, -1]
        expected.append(int(logits[[ids[0] for ids in letters[: q.choices]]].argmax()))
    assert choose(model, tokenizer, prompts, [q.choices for q in questions]) == expected
    assert len({*expected}) > 1
    scores, correct, truncated = evaluate_chat(model, tokenizer, ["arc-easy"], data=data)
    assert correct["arc-easy"] == [a == q.gold for a, q in zip(expected, questions, strict=True)]
    score = scores["arc-easy"]
    guess = sum(1 / q.choices for q in questions) / len(questions)
    assert score.accuracy == sum(correct["arc-easy"]) / 15 and truncated == 0
    assert score.centered == pytest.approx((score.accuracy - guess) / (1 - guess))


def test_prompts_that_are_too_long_lose_their_beginning_but_not_bos(model, tokenizer, data, tmp_path, monkeypatch):
    row = {**ROWS["mmlu"][0], "question": "Which thing? " * 300}
    (tmp_path / "mmlu.jsonl").write_text(json.dumps(row))
    seen = []
    monkeypatch.setattr(chat, "choose", lambda model, tokenizer, prompts, choices: seen.extend(prompts) or [0])
    _, _, truncated = evaluate_chat(model, tokenizer, ["mmlu"], data=tmp_path)
    whole = ask(tokenizer, read_questions("mmlu", tmp_path)[0].text)
    assert seen == [[tokenizer.bos, *whole[-255:]]] and truncated == 1


def test_a_limit_draws_from_all_rows_the_same_each_time(data):
    few, again, all_of_them = (read_questions("arc-easy", data, n) for n in (4, 4, None))
    assert [q.text for q in few] == [q.text for q in again] == [q.text for q in all_of_them[:4]]
    assert [q.text.split("?")[0] for q in few] != [row["question"].split("?")[0] for row in ROWS["arc-easy"][:4]]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 3.\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("####1234.50", "1234.5"),
        ("#### $2,000,000", "2000000"),
        ("#### -7", "-7"),
        ("#### −7", "-7"),
        ("#### -$7", "-7"),
        ("#### +7", "7"),
        ("#### 18.", "18"),
        ("#### .5 of them", "0.5"),
        ("#### 40%", "40"),
        ("#### 7 apples #### 8", "7"),
        ("#### seven, #### 7", "7"),
        ("#### 007", "7"),
        ("the answer is 7", None),
        ("####", None),
        ("#### x7", None),
        ("", None),
    ],
)
def test_the_number_after_the_hashes(text, number):
    assert number_after_hashes(text) == (None if number is None else Decimal(number))


def fake_answers(monkeypatch, by_text):
    """A model that says what it is told to, by what it is asked."""

    def answer(model, tokenizer, prompts, rows):
        return [next(said for text, said in by_text.items() if text in tokenizer.decode(ids)) for ids in prompts]

    monkeypatch.setattr(chat, "answer", answer)


def test_gsm8k_counts_numbers_that_are_equal(model, tokenizer, data, monkeypatch):
    said = ["#### 0.00", "It is 2", "2 + 2 is\n#### 4", "#### -6", "#### 8,", "#### 10.5"]
    fake_answers(monkeypatch, {f"What is {n} and": text for n, text in enumerate(said)})
    scores, correct, _ = evaluate_chat(model, tokenizer, ["gsm8k"], data=data)
    questions = [q.text for q in read_questions("gsm8k", data)]
    order = [int(text.split()[2]) for text in questions]
    assert {n for n, hit in zip(order, correct["gsm8k"], strict=True) if hit} == {0, 2, 4}
    assert scores["gsm8k"].accuracy == scores["gsm8k"].centered == 0.5


@pytest.mark.parametrize("rows", [1, 4])
def test_answers_end_where_the_assistant_ends_and_come_in_order(model, tokenizer, rows, monkeypatch):
    monkeypatch.setattr(chat, "ANSWER_TOKENS", 12)
    end = tokenizer.special["<|assistant_end|>"]
    prompts = [ask(tokenizer, text) for text in ("What is it?", "Which?", "thing " * 9, "A")]
    expected = []
    for ids in prompts:
        said = []
        while len(said) < 12:
            with torch.no_grad():
                token = int(model(torch.tensor([ids + said]))[0, -1].argmax())
            if token in (end, tokenizer.bos):
                break
            said.append(token)
        expected.append(said)
    assert chat.answer(model, tokenizer, prompts, rows) == [tokenizer.decode(said) for said in expected]
    cut = max(map(expected[0].index, expected[0]))  # the last token that it had not said before now ends it
    monkeypatch.setitem(tokenizer.special, "<|assistant_end|>", expected[0][cut])
    assert chat.answer(model, tokenizer, prompts[:1], rows) == [tokenizer.decode(expected[0][:cut])]


linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux")
BLOCK = "Here it is:\n```python\n{}\n```\nIt adds."


@linux
@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        (ADD["canonical_solution"], True),
        (BLOCK.format("def add(a, b):\n    return a + b"), True),
        (BLOCK.format("    return a + b"), True),
        (BLOCK.format("def add(a, b):\n    return sum([a, b])").removesuffix("```\nIt adds."), True),
        ("def add(a, b):\n    return a + b\n", True),
        (BLOCK.format("import math\n\ndef helper(x):\n    return x\n\ndef add(a, b):\n    return helper(a) + b"), True),
        ("    return a - b\n", False),
        ("    return a +\n", False),
        ("I cannot do that.", False),
        ("", False),
        ("    import os; os._exit(0)\n", False),
        ("    raise SystemExit(0)\n", False),
    ],
)
def test_humaneval_passes_what_passes_its_tests(answer, passes, model, tokenizer, data, monkeypatch):
    fake_answers(monkeypatch, {"": answer})
    scores, _, _ = evaluate_chat(model, tokenizer, ["humaneval"], data=data, allow_code_execution=True)
    assert scores["humaneval"].accuracy == passes


def test_what_a_task_imports_is_there_for_an_answer_that_is_whole():
    row = {**ADD, "prompt": "from typing import List\n\n" + ADD["prompt"]}
    code = program(row, BLOCK.format("def add(a, b) -> List[int]:\n    return a + b"))
    assert code.startswith("from typing import List")
    names = {}
    exec(code, names)
    assert names["add"](2, 2) == 4


def test_code_is_not_run_unless_that_is_allowed_nor_where_there_is_no_sandbox(model, tokenizer, data, monkeypatch):
    ran = []
    monkeypatch.setattr(chat, "run_code", ran.append)
    with pytest.raises(ValueError, match="--allow-code-execution"):
        evaluate_chat(model, tokenizer, ["humaneval"], data=data)
    assert not ran

    def refuse(source):
        raise OSError("models' code is not run")

    monkeypatch.setattr(chat, "run_code", refuse)
    monkeypatch.setattr(chat, "answer", lambda *_: pytest.fail("answers were written in vain"))
    with pytest.raises(OSError, match="is not run"):
        evaluate_chat(model, tokenizer, ["humaneval"], data=data, allow_code_execution=True)


@pytest.mark.parametrize(
    ("name", "line", "named"),
    [
        ("mmlu", '{"question": "x", "choices": ["a", "b"]}', "mmlu.jsonl, row 1: no column 'answer'"),
        ("mmlu", '{"question": "x", "choices": ["a", "b"], "answer": 2}', "2 choices and answer 2"),
        ("mmlu", '{"question": "x", "choices": ["a"], "answer": 0}', "1 choices"),
        ("mmlu", '{"question": 5, "choices": ["a", "b"], "answer": 0}', "given int, expected a text"),
        ("mmlu", '{"question": "x", "choices": ["a", null], "answer": 0}', "given NoneType, expected a text"),
        ("mmlu", '{"question": "x"', "row 1: Expecting"),
        ("mmlu", "[1]", "row 1"),
        ("mmlu", "\x00", "row 1"),
        ("mmlu", "[" * 100_000, "row 1"),
        ("mmlu", "", "no rows"),
        ("arc-easy", json.dumps({**arc(0), "answerKey": "E"}), "row 1: 'E' is not in list"),
        ("arc-easy", json.dumps({**arc(0), "choices": ["a"]}), "row 1"),
        ("gsm8k", '{"question": "x", "answer": "7"}', "no number after ####"),
        ("gsm8k", '{"question": "x", "answer": 7}', "given int, expected a text"),
        ("humaneval", '{"prompt": "def f():\\n", "test": ""}', "no column 'entry_point'"),
    ],
)
def test_rows_that_are_wrong_are_named(name, line, named, tmp_path):
    (tmp_path / f"{name}.jsonl").write_text(line)
    with pytest.raises(ValueError) as error:
        read_questions(name, tmp_path)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_missing_and_no_task_at_all_are_named(tmp_path, model, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"no file .*mmlu\.jsonl with the rows of mmlu"):
        read_questions("mmlu", tmp_path)
    with pytest.raises(ValueError, match="tasks: given none"):
        evaluate_chat(model, tokenizer, [], data=tmp_path)
    with pytest.raises(ValueError, match="limit: given 0"):
        evaluate_chat(model, tokenizer, ["mmlu"], data=tmp_path, limit=0)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "mmlu.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(ValueError, match="row 1: 'utf-8' codec"):
        read_questions("mmlu", tmp_path)


@pytest.mark.parametrize("name", TASKS)
def test_without_a_network_the_dataset_and_the_way_around_it_are_named(name, monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        assert args == (TASKS[name].dataset, TASKS[name].subset) and kwargs == {"split": "test"}
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError) as error:
        read_questions(name)
    assert f"{TASKS[name].dataset!r}" in str(error.value) and f"--data DIR reads DIR/{name}.jsonl" in str(error.value)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: ROWS[name])
    assert len(read_questions(name)) == len(ROWS[name])


def test_the_script_leaves_a_report(tmp_path, tokenizer, data):
    run = untrained_run(tmp_path, "d1", tokenizer, sequence_len=128)
    options = ["d1", "--data", data, "--tasks"]
    result = call("chat_eval", *options, *TASKS, "--limit=3", "--allow-code-execution", home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "mean centered over 5 tasks" in result.stdout
    report = read_reports(run, 1)["chat"]
    assert {name: score["examples"] for name, score in report["scores"].items()} == dict.fromkeys(TASKS, 3) | {
        "humaneval": 1
    }
    assert len(report["correct"]["mmlu"]) == 3 and report["limit"] == 3
    wrong = call("chat_eval", *options, "mmlu", "chess", home=tmp_path)
    assert wrong.returncode == 1 and "given chess, expected of arc-easy" in wrong.stderr
    assert wrong.stderr.count("\n") == 1


def test_made_up_tasks_ask_what_tuning_held_back():
    from gkachat.data.conversations import is_val
    from gkachat.eval.chat import _made_up

    for name in ("addition", "counting"):
        few, again = _made_up(name, 0.05, 20), _made_up(name, 0.05, 20)
        assert [q.text for q in few] == [q.text for q in again] and len(few) == 20
        assert all(0 < q.guess < 0.7 for q in few)
    for question in _made_up("addition", 0.05, 50):
        a, b = map(int, re.findall(r"\d+", question.text))
        assert is_val(f"addition {a} {b}", 0.05)
        assert question.is_right(f"so. The answer is {a + b}.") and not question.is_right(f"The answer is {a + b + 1}.")
    assert 300 < len(_made_up("addition", 0.05, 10_000)) < 500  # of 8,100 pairs
    with pytest.raises(ValueError, match="held nothing back"):
        _made_up("addition", 1e-9, 5)
