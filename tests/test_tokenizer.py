"""Text to ids and back."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference

from gkachat.tokenizer import BOS, FILE_NAME, SPECIAL_TOKENS, Tokenizer, train_tokenizer

STDLIB = Path(sysconfig.get_paths()["stdlib"])
LEARNED_FROM = [
    (STDLIB / name).read_text(encoding="utf-8") for name in ("argparse.py", "heapq.py", "json/decoder.py", "this.py")
]
# Sources, prose, other scripts, and numbers, none of which the merges were learned from.
UNSEEN = [
    (STDLIB / name).read_text(encoding="utf-8")
    for name in ("ast.py", "difflib.py", "html/entities.py", "encodings/cp1251.py", "textwrap.py", "turtle.py")
] + [
    "Zwölf Boxkämpfer jagen Viktor\r\n\r\n  über   den großen Sylter Deich.\t\u3000",
    "漢字かな交じり文 ١٢٣٤ ½ 🧑\u200d🚀\u00a0\u2028don't WE'LL 1234567 \x00\x1c\x85 e\u0301",
]
PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Any code point, lone surrogates too, and now and then the text of a special token.
ANY_TEXT = st.lists(st.text(st.characters(exclude_categories=[])) | st.sampled_from(SPECIAL_TOKENS)).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(LEARNED_FROM, 700)


def test_the_vocabulary_has_the_size_that_was_asked_for(tokenizer):
    assert tokenizer.vocab_size == 700


def test_ids_are_contiguous_and_special_tokens_come_last(tokenizer):
    stored = json.loads(tokenizer.json_text)
    assert sorted(stored["model"]["vocab"].values()) == list(range(691))
    assert [tokenizer.special[name] for name in SPECIAL_TOKENS] == list(range(691, 700))
    assert tokenizer.bos == tokenizer.special[BOS]


def test_every_byte_has_an_id_of_its_own(tokenizer):
    ids = [tokenizer.encode(bytes([byte])) for byte in range(256)]
    assert sorted(ids) == [[i] for i in range(256)]


def test_every_id_stands_for_other_bytes(tokenizer):
    assert len({tokenizer.decode_bytes([i]) for i in range(700)}) == 700


@PROPERTY
@given(st.binary())
def test_any_bytes_round_trip(tokenizer, data):
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


@PROPERTY
@given(ANY_TEXT)
def test_any_text_round_trips(tokenizer, text):
    data = text.encode(errors="surrogatepass")
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode(errors="replace")


@PROPERTY
@given(ANY_TEXT)
def test_no_text_becomes_a_special_token(tokenizer, text):
    special = set(tokenizer.special.values())
    assert not special & set(tokenizer.encode(text))
    assert not special & set(tokenizer.encode(text.encode(errors="surrogatepass")))
    assert not special & set(tokenizer.encode_to_numpy(text.encode(errors="replace").decode()).tolist())


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_the_text_of_a_special_token_is_encoded_as_text(tokenizer, name):
    ids = tokenizer.encode(name)
    assert len(ids) > 1
    assert max(ids) < 691
    assert tokenizer.decode(ids) == name == tokenizer.decode([tokenizer.special[name]])


@PROPERTY
@given(ANY_TEXT)
def test_token_bytes_add_up_to_the_bytes_of_the_text(tokenizer, text):
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode(errors="surrogatepass"))


def test_special_tokens_stand_for_no_bytes_and_all_others_for_some(tokenizer):
    lengths = tokenizer.token_bytes()
    assert lengths.dtype == np.int32
    assert lengths.shape == (700,)
    assert (lengths[:691] >= 1).all()
    assert (lengths == 1).sum() == 256
    assert not lengths[691:].any()


def test_encoding_is_that_of_the_stored_json_in_its_own_library(tokenizer):
    reference = Reference.from_str(tokenizer.json_text)
    for text in LEARNED_FROM + UNSEEN:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_the_array_has_the_ids_of_the_list(tokenizer):
    for text in UNSEEN:
        array = tokenizer.encode_to_numpy(text)
        assert array.dtype == np.uint16
        assert array.tolist() == tokenizer.encode(text)


def test_merges_shorten_text(tokenizer):
    text = "".join(UNSEEN[:2])
    assert len(tokenizer.encode(text)) < len(text.encode()) / 2


def test_a_token_has_at_most_two_digits(tokenizer):
    for i in range(691):
        assert sum(c.isdigit() for c in tokenizer.decode([i])) <= 2
    # Numbers that are in the text often enough for a longer merge to be worth its while.
    eager = train_tokenizer(["1234567 " * 1000], 512)
    pieces = [eager.decode([i]) for i in eager.encode("1234567")]
    assert pieces == ["12", "34", "56", "7"]


def test_a_saved_tokenizer_is_the_same_when_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "directory")
    loaded = Tokenizer.load(tmp_path / "new" / "directory")
    assert loaded.sha256 == tokenizer.sha256
    assert (loaded.vocab_size, loaded.bos, loaded.special) == (700, tokenizer.bos, tokenizer.special)
    for text in UNSEEN:
        assert loaded.encode(text) == tokenizer.encode(text)


def test_training_is_deterministic(tokenizer):
    assert train_tokenizer(iter(LEARNED_FROM), 700).sha256 == tokenizer.sha256


def test_another_text_gives_another_tokenizer(tokenizer):
    assert train_tokenizer(LEARNED_FROM[:2], 700).sha256 != tokenizer.sha256


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_nothing_to_learn_from_is_an_error(texts):
    with pytest.raises(ValueError, match="no text to learn from"):
        train_tokenizer(texts, 600)


def test_a_small_corpus_gives_a_smaller_vocabulary_that_works():
    small = train_tokenizer(["ab ab ab"], 600)
    assert 256 + len(SPECIAL_TOKENS) < small.vocab_size < 300
    assert small.bos == small.vocab_size - len(SPECIAL_TOKENS)
    assert small.decode(small.encode("abba ü")) == "abba ü"


def test_a_missing_tokenizer_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scripts\.tok_train"):
        Tokenizer.load(tmp_path)


def with_vocabulary(change):
    def damage(text):
        stored = json.loads(text)
        stored["model"]["vocab"] = change(stored["model"]["vocab"])
        return json.dumps(stored).encode()

    return damage


def without(key):
    def damage(text):
        stored = json.loads(text)
        del stored[key]
        return json.dumps(stored).encode()

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text.encode()[: len(text) // 2],
        lambda text: b"\xff" + text.encode(),
        lambda text: b"[]",
        lambda text: b"null",
        without("model"),
        without("added_tokens"),
        lambda text: text.replace(BOS, "<|start|>").encode(),
        lambda text: text.replace('"a":', '"\\u4e00":').encode(),
        with_vocabulary(list),
        with_vocabulary(lambda vocab: vocab | {"a": vocab["b"]}),
    ],
    ids=[
        "empty",
        "cut",
        "not UTF-8",
        "list",
        "null",
        "no model",
        "no special",
        "no bos",
        "no letter",
        "no ids",
        "twice",
    ],
)
def test_a_damaged_file_is_named(tokenizer, tmp_path, damage):
    content = damage(tokenizer.json_text)
    assert content != tokenizer.json_text.encode()
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=f"{FILE_NAME} is not a gkachat tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", [" " * 1_200_000 + "x", "\u3000" * 1_100_000])
def test_a_million_spaces_do_not_overflow_the_regex(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_to_numpy(text).tolist() == tokenizer.encode(text)


def test_a_gap_in_the_ids_is_noticed(tokenizer, tmp_path):
    tree = json.loads(tokenizer.json_text)
    tree["model"]["vocab"]["a"] = 3000
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="not a gkachat tokenizer"):
        Tokenizer.load(tmp_path)
