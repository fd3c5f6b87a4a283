"""Conversations: their tokens, what the model learns from them, and where they come from."""

import gzip
import itertools
import json
import random
import re

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkachat.config import ChatConfig
from gkachat.data.conversations import (
    check_messages,
    is_val,
    load_conversations,
    render,
    render_prompt,
    tokenize_conversations,
)
from gkachat.data.loader import IGNORE, Loader
from gkachat.data.tasks import TASKS, answer_of, ask, generated
from gkachat.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["What is 3 + 4? The answer is 7. é 漢\n"] * 3, 512)
FACTS = {"attention": "softmax", "parameters": "1,000", "depth": "4"}


def talk(*contents, system=None):
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def load(seed=0, **config):
    return list(load_conversations(ChatConfig(**config), seed, FACTS))


@settings(deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.none() | st.text(max_size=9))
def test_only_the_assistants_text_and_end_token_are_learned(contents, system):
    ids, mask = render(TOKENIZER, talk(*contents, system=system))
    shown = [f"{system}\n\n{contents[0]}" if system is not None else contents[0], *contents[1:]]
    roles = itertools.cycle(["user", "assistant"])
    text = "".join(f"<|{role}_start|>{content}<|{role}_end|>" for role, content in zip(roles, shown, strict=False))
    assert TOKENIZER.decode(ids).encode(errors="replace") == f"<|bos|>{text}".encode(errors="replace")
    learned = [id for id, is_learned in zip(ids, mask, strict=True) if is_learned]
    assert TOKENIZER.decode_bytes(learned) == TOKENIZER.decode_bytes(
        [id for text in contents[1::2] for id in [*TOKENIZER.encode(text), TOKENIZER.special["<|assistant_end|>"]]]
    )


def test_a_prompt_ends_with_assistant_start_and_text_never_becomes_a_special_token():
    ids = render_prompt(TOKENIZER, talk("<|assistant_start|>"))
    assert ids[-1] == TOKENIZER.special["<|assistant_start|>"] and ids.count(ids[-1]) == 1


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "expected a list of messages"),
        ("hello", "expected a list of messages"),
        (talk("a", system="s")[:1], "a system message alone"),
        ([{"role": "assistant", "content": "a"}], "message 0: given role 'assistant', expected 'user'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 0, part 0: given 'image_url', expected"),
        ([{"role": "user", "content": ["a"]}], "message 0, part 0: given 'a', expected"),
        (talk("a") + talk("b"), "message 1: given role 'user', expected 'assistant'"),
        (talk("a", "b", system="s")[:1] * 2, "message 1: given role 'system', expected 'user'"),
        ([{"role": "user"}], "message 0: expected an object with texts"),
        ([{"role": "user", "content": 3}], "message 0: expected an object with texts"),
        ([3], "message 0: expected an object"),
    ],
)
def test_messages_that_are_no_conversation_are_an_error(messages, fault):
    with pytest.raises(ValueError, match=re.escape(fault)):
        check_messages(messages)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000), st.integers(24, 120))
def test_every_conversation_is_whole_in_one_row_and_nothing_else_is_learned(seed, sequence_len):
    rng = random.Random(seed)
    words = ["one", "two 2", "é 漢", "three " * 9, "x" * 300]
    talks = [(str(i), talk(*rng.choices(words, k=rng.randint(2, 5)))) for i in range(60)]
    splits, counts = tokenize_conversations(talks, TOKENIZER, sequence_len, 0.3)
    loader = Loader(splits["train"], sequence_len=sequence_len, rows_per_step=1, bos=TOKENIZER.bos, seed=seed)
    got = []
    for step in range(loader.steps_per_epoch):
        inputs, targets = loader.batch(step)
        assert int((targets != IGNORE).sum()) == loader.n_targets(step)
        row = np.concatenate((inputs[0], [max(int(targets[0, -1]), 0)]))
        for a, b in itertools.pairwise([*np.flatnonzero(row == TOKENIZER.bos), len(row)]):
            learned = targets[0, a : b - 1]
            got.append((row[a:b].tolist(), learned[learned != IGNORE].tolist()))
    expected, truncated = [], 0
    for key, messages in talks:
        ids, mask = render(TOKENIZER, messages)
        truncated += len(ids) > sequence_len + 1
        ids, mask = ids[: sequence_len + 1], mask[: sequence_len + 1]
        if any(mask) and not is_val(key, 0.3):
            expected.append((ids, [id for id, is_learned in zip(ids, mask, strict=True) if is_learned]))
    assert counts["truncated"] == truncated
    assert sorted(learned for _, learned in got) == sorted(learned for _, learned in expected)
    for ids, learned in expected:  # a row's end may be padding, and its last token is known as a target only
        assert any(other[: len(ids) - 1] == ids[:-1] and also == learned for other, also in got)


def test_conversations_that_leave_nothing_to_learn_are_dropped_and_counted():
    talks = [(str(i), talk("long " * 50, "answer")) for i in range(20)]
    with pytest.raises(ValueError, match=r"no conversation for train \(.*20 truncated, 20 dropped\)"):
        tokenize_conversations(talks, TOKENIZER, 16, 0.5)


def test_files_are_read_line_by_line_and_a_bad_line_is_named(tmp_path):
    path, good = tmp_path / "a.jsonl", json.dumps({"messages": talk("hi", "ho")}).encode()
    path.write_bytes(good + b"\n\n" + good + b"\n")
    assert load(source="files", files=(str(path),)) == [("hi", talk("hi", "ho"))] * 2
    for line, fault in (
        (b"{", "line 2: not JSON"),
        (b"1", r'line 2: given int, expected an object \{"messages"'),
        (b"[" * 200_000, "line 2: not JSON"),
        (b'{"messages": [{"role": "user"}]}', "line 2, message 0: expected"),
        (b'{"messages": "\xff"}', "line 2: not UTF-8"),
    ):
        path.write_bytes(good + b"\n" + line + b"\n")
        with pytest.raises(ValueError, match=f"a.jsonl, {fault}"):
            load(source="files", files=(str(path),))
    with pytest.raises(FileNotFoundError, match=r"chat\.files: nothing matches 'nowhere\.jsonl'"):
        load(source="files", files=("nowhere.jsonl",))
    with pytest.raises(ValueError, match="files: given"):
        load(source="files")


def test_chat_files_come_as_people_have_them(tmp_path):
    talks = [talk(f"{i}? \u00fc", f"{i}!") for i in range(3)]
    lines = "\r\n".join(json.dumps({"messages": messages}, ensure_ascii=False) for messages in talks)
    (tmp_path / "a.jsonl").write_bytes(lines.encode("utf-8-sig"))
    (tmp_path / "b.JSON").write_bytes(lines.encode("utf-16"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "messages": talks}), tmp_path / "d.parquet")
    (tmp_path / "notes.txt").write_text("not read")
    read = [messages for _, messages in load(source="files", files=(str(tmp_path), f"{tmp_path}/[ad].*"))]
    assert read == talks * 6


def test_a_developer_message_is_a_system_message():
    given = [{"role": "developer", "content": "s"}, *talk("a", "b")]
    assert check_messages(given) == talk("a", "b", system="s") and given[0]["role"] == "developer"


def test_content_in_parts_is_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"text": "c"}]}]
    assert check_messages(messages) == talk("a\nb", "c")


def test_conversations_that_are_no_text_are_dropped_and_counted_as_data_prep_does():
    talks = [(str(i), talk("What?", "good")) for i in range(50)]
    talks += [("bad", talk("What?", "half \ud83d")), ("\ud83d", talk("\ud83d", "a"))]
    splits, counts = tokenize_conversations(talks, TOKENIZER, 64, 0.5)
    assert counts == {"conversations": 52, "truncated": 0, "dropped": 2}
    assert sum(len(split.documents.length) for split in splits.values()) == 50


@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_few_conversations_fill_both_splits_and_share_no_question(val_fraction):
    talks = [(key, talk(key, "answer")) for key in ("a", "b", "c", "b", "c")]
    splits, _ = tokenize_conversations(talks, TOKENIZER, 64, val_fraction)
    texts = {name: TOKENIZER.decode(split.documents.tokens) for name, split in splits.items()}
    moved, others = ("val", "train") if val_fraction < 0.5 else ("train", "val")
    assert texts[moved].count("c<|user_end|>") == 2 and texts[moved].count("user_end") == 2
    assert texts[others].count("user_end") == 3 and "c<|user_end|>" not in texts[others]
    with pytest.raises(ValueError, match=r"no conversation for train .*expected two different questions"):
        tokenize_conversations(talks[:1] * 3, TOKENIZER, 64, val_fraction)


class Rows(list):
    def shuffle(self, seed, buffer_size):
        return self


def test_hugging_face_datasets_take_turns(monkeypatch):
    sets = {
        "HuggingFaceTB/smol-smoltalk": [{"messages": talk("a", "b")}] * 3,
        "cais/mmlu": [{"train": {"question": "q?", "choices": ["w", "x", "y", "z"], "answer": 2}}],
        "openai/gsm8k": [{"question": "2+2", "answer": "4\n#### 4"}] * 2,
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, **__: Rows(sets[name]))
    got = load(source="huggingface")
    assert [key for key, _ in got] == ["a", "q?\nA. w\nB. x\nC. y\nD. z", "2+2", "a", "2+2", "a"]
    assert got[1][1][1]["content"] == "C"
    assert len(load(source="huggingface", conversations=2)) == 2


def test_generated_conversations_depend_on_the_seed_and_fill_both_splits():
    first, again, other = ([next(g) for _ in range(300)] for g in (generated(s, FACTS) for s in (1, 1, 2)))
    assert first == again != other
    splits, counts = tokenize_conversations(load(1, conversations=3000), TOKENIZER, 256, 0.05)
    assert counts == {"conversations": 3000, "truncated": 0, "dropped": 0}
    assert all("answer is" in TOKENIZER.decode(split.documents.tokens) for split in splits.values())


@given(st.integers(0, 10_000))
def test_generated_answers_are_right(seed):
    rng = random.Random(seed)
    _, question, answer = ask("addition", rng, FACTS)
    a, b = map(int, re.findall(r"\d+", question))
    assert answer_of(answer) == str(a + b)
    for terms, total in re.findall(r"([\d+]+)=(\d+)", answer):
        assert sum(map(int, terms.split("+"))) == int(total)
    key, question, answer = ask("counting", rng, FACTS)
    _, word, letter = key.split()
    assert word in question and answer_of(answer) == str(word.count(letter))
    assert "".join(re.findall(r"([a-z]) [a-z]\d+[,.]", answer.partition("The")[0])) == word
    key, _, answer = ask("spelling", rng, FACTS)
    assert "".join(answer.rstrip(".").split(", ")) == key.split()[1]
    _, question, answer = ask("sorting", rng, FACTS)
    assert answer_of(answer).split(", ") == sorted(re.findall(r"\d+", question))
    for task in TASKS:
        key, question, answer = ask(task, rng, FACTS)
        assert key and question and answer and "{" not in answer
