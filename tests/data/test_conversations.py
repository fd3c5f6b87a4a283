"""Conversations: what the model is shown, what it learns from, and what is no conversation."""

import dataclasses
import itertools
import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkachat.config import ChatConfig
from gkachat.data.conversations import check, conversations, is_val, prompt, render, tokenize
from gkachat.data.loader import IGNORE, Loader
from gkachat.data.tasks import TASKS, answer_of, ask, generated
from gkachat.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["What is 3 + 4? The answer is 7. é 漢\n"] * 3, 512)
FACTS = {"attention": "softmax", "parameters": "1,000", "depth": "4"}


def talk(*said, system=None):
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(said)]


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.none() | st.text(max_size=9))
def test_a_rendering_reads_back_and_only_what_the_assistant_says_is_learned(said, system):
    ids, mask = render(TOKENIZER, talk(*said, system=system))
    shown = [f"{system}\n\n{said[0]}" if system is not None else said[0], *said[1:]]
    text = "".join(
        f"<|{role}_start|>{content}<|{role}_end|>"
        for role, content in zip(["user", "assistant"] * 3, shown, strict=False)
    )
    assert TOKENIZER.decode(ids).encode(errors="replace") == ("<|bos|>" + text).encode(errors="replace")
    learned = [id for id, scored in zip(ids, mask, strict=True) if scored]
    assert TOKENIZER.decode_bytes(learned) == TOKENIZER.decode_bytes(
        [id for s in said[1::2] for id in [*TOKENIZER.encode(s), TOKENIZER.special["<|assistant_end|>"]]]
    )


def test_a_prompt_ends_where_the_assistant_begins_and_text_never_becomes_a_special_token():
    ids = prompt(TOKENIZER, talk("<|assistant_start|>"))
    assert ids[-1] == TOKENIZER.special["<|assistant_start|>"] and ids.count(ids[-1]) == 1


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "expected a list of messages"),
        ("hello", "expected a list of messages"),
        (talk("a", system="s")[:1], "a system message alone"),
        ([{"role": "assistant", "content": "a"}], "message 0: given role 'assistant', expected 'user'"),
        (talk("a") + talk("b"), "message 1: given role 'user', expected 'assistant'"),
        (talk("a", "b", system="s")[:1] * 2, "message 1: given role 'system', expected 'user'"),
        ([{"role": "user"}], "message 0: expected an object with texts"),
        ([{"role": "user", "content": 3}], "message 0: expected an object with texts"),
        ([3], "message 0: expected an object"),
    ],
)
def test_what_is_no_conversation_is_named(messages, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        check(messages)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(24, 120))
def test_every_conversation_is_whole_in_one_row_and_nothing_else_is_learned(seed, sequence_len):
    rng = random.Random(seed)
    words = ["one", "two 2", "é 漢", "three " * 9, "x" * 300]
    talks = [(str(i), talk(*rng.choices(words, k=rng.randint(2, 5)))) for i in range(60)]
    found = tokenize(talks, TOKENIZER, sequence_len, 0.3)
    split = found.splits["train"]
    loader = Loader(split, sequence_len=sequence_len, batch_rows=1, bos=TOKENIZER.bos, seed=seed)
    got, truncated = [], 0
    for step in range(loader.steps_per_epoch):
        idx, targets = loader.batch(step)
        assert int((targets != IGNORE).sum()) == loader.n_targets(step)
        whole = np.concatenate((idx[0], [max(int(targets[0, -1]), 0)]))
        starts = [*np.flatnonzero(whole == TOKENIZER.bos), len(whole)]
        for a, b in itertools.pairwise(starts):
            scored = [int(t) for t in targets[0, a : b - 1] if t != IGNORE]
            got.append((tuple(int(t) for t in whole[a:b]), tuple(scored)))
    want = []
    for key, messages in talks:
        ids, mask = (part[: sequence_len + 1] for part in render(TOKENIZER, messages))
        truncated += len(render(TOKENIZER, messages)[0]) > sequence_len + 1
        if any(mask) and not is_val(key, 0.3):
            want.append((tuple(ids), tuple(id for id, m in zip(ids, mask, strict=True) if m)))
    assert found.counts["truncated"] == truncated
    # Of a row the end may be padding, and its very last token is known as a target only.
    assert sorted(scored for _, scored in got) == sorted(scored for _, scored in want)
    for ids, scored in want:
        assert any(other[: len(ids) - 1] == ids[:-1] and s == scored for other, s in got)


def test_conversations_that_leave_nothing_to_learn_are_dropped_and_counted():
    talks = [(str(i), talk("long " * 50, "answer")) for i in range(20)]
    with pytest.raises(ValueError, match=r"no conversation for train \(.*'truncated': 20, 'dropped': 20"):
        tokenize(talks, TOKENIZER, 16, 0.5)


def test_files_are_read_and_their_faults_named(tmp_path):
    good, bad = json.dumps({"messages": talk("hi", "ho")}), tmp_path / "bad.jsonl"
    (tmp_path / "a.jsonl").write_text(good + "\n\n" + good + "\n")
    config = ChatConfig(source="files", files=(str(tmp_path / "a.jsonl"),))
    assert [key for key, _ in conversations(config, 0, {})] == ["hi", "hi"]
    for line, told in (
        ("{", "line 2: not JSON"),
        ("[1]", r'line 2: expected an object \{"messages"'),
        ('{"messages": [{"role": "user"}]}', "line 2, message 0: expected"),
    ):
        bad.write_text(good + "\n" + line + "\n")
        with pytest.raises(ValueError, match=told):
            list(conversations(dataclasses.replace(config, files=(str(bad),)), 0, {}))
    bad.write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl: not UTF-8"):
        list(conversations(dataclasses.replace(config, files=(str(bad),)), 0, {}))
    with pytest.raises(FileNotFoundError, match=r"chat.files: no file nowhere.jsonl"):
        list(conversations(dataclasses.replace(config, files=("nowhere.jsonl",)), 0, {}))
    with pytest.raises(ValueError, match="files: given"):
        ChatConfig(source="files")


def test_datasets_take_turns(monkeypatch):
    import datasets

    class Rows(list):
        def shuffle(self, seed, buffer_size):
            return self

    sets = {
        "HuggingFaceTB/smol-smoltalk": [{"messages": talk("a", "b")}] * 3,
        "cais/mmlu": [{"train": {"question": "q?", "choices": ["w", "x", "y", "z"], "answer": 2}}],
        "openai/gsm8k": [{"question": "2+2", "answer": "4\n#### 4"}] * 2,
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, **__: Rows(sets[name]))
    got = list(conversations(ChatConfig(source="huggingface"), 0, {}))
    assert [key for key, _ in got] == ["a", "q?\nA. w\nB. x\nC. y\nD. z", "2+2", "a", "2+2", "a"]
    assert got[1][1][1]["content"] == "C"
    assert len(list(conversations(ChatConfig(source="huggingface", conversations=2), 0, {}))) == 2

    def fails(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(ValueError, match=r"cannot read HuggingFaceTB/smol-smoltalk .*: no route$"):
        list(conversations(ChatConfig(source="huggingface"), 0, {}))


def test_made_up_conversations_are_the_seeds_and_hold_what_is_asked_in_val_back():
    first, again, other = ([next(g) for _ in range(300)] for g in (generated(s, FACTS) for s in (1, 1, 2)))
    assert first == again != other
    found = tokenize(conversations(ChatConfig(conversations=3000), 1, FACTS), TOKENIZER, 256, 0.05)
    assert found.counts == {"conversations": 3000, "truncated": 0, "dropped": 0}
    texts = {name: TOKENIZER.decode(split.documents.tokens) for name, split in found.splits.items()}
    sums = {name: set(re.findall(r"answer is (\d+)", text)) for name, text in texts.items()}
    assert sums["train"] and sums["val"]


@given(st.integers(0, 10_000))
def test_made_up_answers_are_right(seed):
    rng = random.Random(seed)
    _, question, answer = ask("addition", rng, FACTS)
    a, b = map(int, re.findall(r"\d+", question))
    assert answer_of(answer) == str(a + b)
    for sum_ in re.findall(r"([\d +]+) = (\d+)", answer):
        assert sum(map(int, sum_[0].split("+"))) == int(sum_[1])
    key, question, answer = ask("counting", rng, FACTS)
    _, word, letter = key.split()
    assert word in question and answer_of(answer) == str(word.count(letter))
    assert "".join(re.findall(r"([a-z]) [a-z] \d+[,.]", answer.partition("The")[0])) == word
    key, _, answer = ask("spelling", rng, FACTS)
    assert "".join(answer.rstrip(".").split(", ")) == key.split()[1]
    _, question, answer = ask("sorting", rng, FACTS)
    assert answer_of(answer).split(", ") == sorted(re.findall(r"\d+", question))
    for task in TASKS:
        key, question, answer = ask(task, rng, FACTS)
        assert key and question and answer and "{" not in answer
