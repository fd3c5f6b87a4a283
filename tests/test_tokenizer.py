"""Tokenizer: text to ids and back."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference

from gkachat.tokenizer import (
    BOS,
    FILE_NAME,
    LEARNED_CHARS,
    SPECIAL_TOKENS,
    Tokenizer,
    pre_tokenizer,
    train_tokenizer,
)

STDLIB = Path(sysconfig.get_paths()["stdlib"])
TRAINED_ON = [
    (STDLIB / name).read_text(encoding="utf-8") for name in ("argparse.py", "heapq.py", "json/decoder.py", "this.py")
]
UNSEEN = [
    (STDLIB / name).read_text(encoding="utf-8") for name in ("ast.py", "html/entities.py", "encodings/cp1251.py")
] + [
    "Zwölf Boxkämpfer jagen Viktor\r\n\r\n  über   den großen Sylter Deich.\t\u3000",
    "漢字かな交じり文 ١٢٣٤ ½ 🧑\u200d🚀\u00a0\u2028don't WE'LL 1234567 \x00\x1c\x85 e\u0301",
]
PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Any code points, lone surrogates included, and sometimes the text of a special token.
ANY_TEXT = st.lists(st.text(st.characters(exclude_categories=[])) | st.sampled_from(SPECIAL_TOKENS)).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TRAINED_ON, 700)


def test_special_tokens_come_last_and_every_id_has_its_own_bytes(tokenizer):
    assert tokenizer.vocab_size == 700
    assert [tokenizer.special[name] for name in SPECIAL_TOKENS] == list(range(691, 700))
    assert tokenizer.bos == tokenizer.special[BOS]
    stands_for = {tokenizer.decode_bytes([i]) for i in range(700)}
    assert len(stands_for) == 700 and {bytes([byte]) for byte in range(256)} <= stands_for


@PROPERTY
@given(ANY_TEXT)
def test_any_text_round_trips_and_none_becomes_a_special_token(tokenizer, text):
    data, ids, special = text.encode(errors="surrogatepass"), tokenizer.encode(text), set(tokenizer.special.values())
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode(errors="replace")
    assert tokenizer.token_bytes()[ids].sum() == len(data)
    assert not special & set(ids)
    assert not special & set(tokenizer.encode_to_numpy(text.encode(errors="replace").decode()).tolist())


def test_the_text_of_a_special_token_is_encoded_as_text(tokenizer):
    for name in SPECIAL_TOKENS:
        ids = tokenizer.encode(name)
        assert len(ids) > 1 and max(ids) < 691
        assert tokenizer.decode(ids) == name == tokenizer.decode([tokenizer.special[name]])


def test_special_tokens_have_no_bytes_and_all_others_have_some(tokenizer):
    lengths = tokenizer.token_bytes()
    assert lengths.dtype == np.int32 and lengths.shape == (700,)
    assert (lengths[:691] >= 1).all() and (lengths == 1).sum() == 256 and not lengths[691:].any()


def test_encoding_is_that_of_the_tokenizers_library(tokenizer):
    reference = Reference.from_str(tokenizer.json_text)
    for text in TRAINED_ON + UNSEEN:
        ids, array = tokenizer.encode(text), tokenizer.encode_to_numpy(text)
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert array.dtype == np.uint16 and array.tolist() == ids
    assert len(tokenizer.encode(UNSEEN[0])) < len(UNSEEN[0].encode()) / 2  # merges shorten text


def test_a_token_has_at_most_two_digits(tokenizer):
    assert all(sum(c.isdigit() for c in tokenizer.decode([i])) <= 2 for i in range(691))
    numbers = train_tokenizer(["1234567 " * 1000], 512)  # frequent enough that longer merges would pay
    assert [numbers.decode([i]) for i in numbers.encode("1234567")] == ["12", "34", "56", "7"]


def test_a_saved_tokenizer_loads_unchanged(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "directory")
    loaded = Tokenizer.load(tmp_path / "new" / "directory")
    assert loaded.json_text == tokenizer.json_text and loaded.sha256 == tokenizer.sha256


def test_training_depends_on_the_text_alone(tokenizer):
    assert train_tokenizer(iter(TRAINED_ON), 700).sha256 == tokenizer.sha256
    assert train_tokenizer(TRAINED_ON[:2], 700).sha256 != tokenizer.sha256


def test_no_text_to_learn_from_is_an_error():
    for texts in ([], ["", ""]):
        with pytest.raises(ValueError, match="no text to learn from"):
            train_tokenizer(texts, 600)


def test_a_small_corpus_gives_a_smaller_vocabulary_that_works():
    small = train_tokenizer(["ab ab ab"], 600)
    assert 256 + len(SPECIAL_TOKENS) < small.vocab_size < 300
    assert small.bos == small.vocab_size - len(SPECIAL_TOKENS)
    assert small.decode(small.encode("abba ü")) == "abba ü"


def test_a_missing_tokenizer_error_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scripts\.tok_train"):
        Tokenizer.load(tmp_path)


def edited(edit):
    """Damage that edits the stored JSON tree in place."""

    def damage(text):
        edit(tree := json.loads(text))
        return json.dumps(tree).encode()

    return damage


DAMAGE = {
    "empty": lambda text: b"",
    "cut": lambda text: text.encode()[: len(text) // 2],
    "not UTF-8": lambda text: b"\xff" + text.encode(),
    "a list": lambda text: b"[]",
    "null": lambda text: b"null",
    "no model": edited(lambda tree: tree.pop("model")),
    "no special tokens": edited(lambda tree: tree.pop("added_tokens")),
    "no bos": lambda text: text.replace(BOS, "<|start|>").encode(),
    "an unknown letter": lambda text: text.replace('"a":', '"\\u4e00":').encode(),
    "no ids": edited(lambda tree: tree["model"].update(vocab=list(tree["model"]["vocab"]))),
    "an id twice": edited(lambda tree: tree["model"]["vocab"].update(a=tree["model"]["vocab"]["b"])),
    "a gap in the ids": edited(lambda tree: tree["model"]["vocab"].update(a=3000)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_an_error_that_names_it(tokenizer, tmp_path, damage):
    content = damage(tokenizer.json_text)
    assert content != tokenizer.json_text.encode()
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=f"{FILE_NAME} is not a gkachat tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_million_spaces_do_not_overflow_the_regex(tokenizer):
    text = "\u3000" * 1_100_000
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.encode_to_numpy(text).tolist() == ids


def test_words_are_learned_in_parts_of_bounded_length_and_encoded_whole():
    """Learning takes time that grows with the square of a word's length: a minute for 200,000 letters."""
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 200_000)) + " end\n"
    words = [word for word, _ in pre_tokenizer(LEARNED_CHARS).pre_tokenize_str(text)]
    assert "".join(words).endswith("ĠendĊ") and max(map(len, words)) == LEARNED_CHARS
    learned = train_tokenizer([text], 300)
    assert learned.vocab_size == 300
    reference = Reference.from_str(learned.json_text)  # which has the words whole
    assert learned.encode(text[-5000:]) == reference.encode(text[-5000:], add_special_tokens=False).ids
    assert [word for word, _ in reference.pre_tokenizer.pre_tokenize_str(text)][1:] == ["Ġend", "Ċ"]
