"""Which documents a source gives, which are kept, and which split they are in."""

import json
import random
import sysconfig
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gkachat.config import DataConfig
from gkachat.data.sources import Corpus

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def text_of(i):
    return f"document {i}: long enough to be kept, all in all"


def corpus_of(*files, **options):
    return Corpus(DataConfig(source="files", files=tuple(map(str, files)), **options))


def texts_of(*files, **options):
    return [text for _, text in corpus_of(*files, **options)]


@pytest.fixture
def write(tmp_path):
    """Write a .txt, .jsonl or .parquet file that holds the given texts; its path."""

    def write(name, texts, column="text"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))
        elif path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), column: texts}), path)
        else:
            [text] = texts
            path.write_bytes(text.encode())
        return path

    return write


def test_the_split_of_a_document_depends_on_its_text_alone(write):
    texts = [text_of(i) for i in range(300)]
    splits = {text: split for split, text in corpus_of(write("all.jsonl", texts), val_fraction=0.3)}
    assert set(splits) == set(texts)
    assert set(splits.values()) == {"train", "val"}
    random.Random(0).shuffle(texts)
    assert [(splits[text], text) for text in texts] == list(corpus_of(write("b.jsonl", texts), val_fraction=0.3))
    few = texts[::7]
    assert [(splits[text], text) for text in few] == list(corpus_of(write("c.parquet", few), val_fraction=0.3))


def test_a_larger_val_fraction_keeps_what_was_in_val(write):
    path = write("a.jsonl", [text_of(i) for i in range(1000)])
    small, large = (
        {text for split, text in corpus_of(path, val_fraction=fraction) if split == "val"} for fraction in (0.1, 0.4)
    )
    assert small < large


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_the_share_of_val_is_about_what_was_asked_for(write, fraction):
    n = 20_000
    splits = [split for split, _ in corpus_of(write("a.jsonl", [text_of(i) for i in range(n)]), val_fraction=fraction)]
    assert abs(splits.count("val") - n * fraction) < 4 * (n * fraction * (1 - fraction)) ** 0.5


def test_near_empty_and_duplicate_documents_are_dropped_and_counted(write):
    kept = ["0123456789", "  0123456789\n", "漢字かな交じり文十字"]
    texts = [kept[0], "012345678", kept[1], " " * 50, kept[0], "", kept[2], kept[1], kept[0]]
    corpus = corpus_of(write("a.jsonl", texts), min_chars=10)
    assert [text for _, text in corpus] == kept
    assert corpus.counts == {"kept": 3, "near_empty": 3, "duplicate": 3, "not_utf8": 0}


def test_documents_come_in_the_same_order_when_iterated_again(write):
    corpus = corpus_of(write("a.jsonl", [text_of(i % 60) for i in range(90)]), val_fraction=0.5)
    first, counts = list(corpus), corpus.counts
    assert list(corpus) == first
    assert corpus.counts == counts == {"kept": 60, "near_empty": 0, "duplicate": 30, "not_utf8": 0}


@pytest.mark.parametrize(("max_chars", "kept"), [(1, 1), (100, 1), (101, 2), (500, 5), (501, 6), (10_000, 10)])
def test_reading_stops_once_there_are_enough_characters(write, max_chars, kept):
    path = write("a.jsonl", ["short"] + [str(i) * 100 for i in range(10)])
    assert len(texts_of(path, max_chars=max_chars)) == kept


def test_what_comes_after_enough_characters_is_not_looked_at(write, tmp_path):
    write("a.txt", ["x" * 100])
    (tmp_path / "b.txt").write_bytes(b"\xff")
    assert texts_of(tmp_path / "*.txt", max_chars=100) == ["x" * 100]


def test_a_txt_file_is_one_document_as_it_stands(write):
    text = "erste Zeile: Über\r\n\r\nzweite Zeile: \x0c漢字\u2028dritte\n"
    assert texts_of(write("a.txt", [text])) == [text]


def test_a_jsonl_file_has_a_document_a_line(write):
    texts = ["one line\nand another, in one document", "Über 漢字 \U0001f600 " * 4]
    path = write("a.jsonl", texts)
    path.write_text(path.read_text().replace("\n", "\n\n  \n"))
    assert texts_of(path) == texts


def test_a_parquet_file_has_a_document_a_row(write):
    texts = [text_of(i) for i in range(100)] + ["Über 漢字 \U0001f600\r\n " * 4]
    assert texts_of(write("a.parquet", texts)) == texts


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_the_text_column_can_be_named(write, name):
    assert texts_of(write(name, [text_of(1)], column="content"), text_column="content") == [text_of(1)]


def test_globs_match_in_sorted_order_and_patterns_in_theirs(write, tmp_path):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "deep/d.txt", "e.jsonl"):
        write(name, [f"{name}: long enough to be kept, all in all"])
    (tmp_path / "directory.txt").mkdir()

    def names(*patterns):
        return [text.split(":")[0] for text in texts_of(*(tmp_path / pattern for pattern in patterns))]

    assert names("*.txt") == ["a.txt", "b.txt"]
    assert names("**/*.txt") == ["a.txt", "b.txt", "deep/d.txt", "deep/er/c.txt"]
    assert names("e.jsonl", "?.txt") == ["e.jsonl", "a.txt", "b.txt"]
    assert names("b.txt", "*.txt") == ["b.txt", "a.txt"]


def test_a_home_directory_is_expanded(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("a.txt", [text_of(1)])
    assert texts_of("~/*.txt") == [text_of(1)]


def test_a_file_that_is_missing_is_named(write, tmp_path):
    write("a.txt", [text_of(1)])
    for pattern in ("b.txt", "*.jsonl"):
        with pytest.raises(FileNotFoundError) as error:
            texts_of(tmp_path / "a.txt", tmp_path / pattern)
        assert str(error.value) == f"data.files: nothing matches {str(tmp_path / pattern)!r}"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_an_empty_file_is_named(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"/{name}: the file is empty$"):
        texts_of(tmp_path / name)


@pytest.mark.parametrize(("name", "given"), [("a.csv", ".csv"), ("a", "no suffix"), ("a.txt.gz", ".gz")])
def test_an_unknown_suffix_is_named(tmp_path, name, given):
    (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match=rf"/{name}: given {given}, expected one of \.txt, \.jsonl, \.parquet$"):
        texts_of(tmp_path / name)


def test_a_txt_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes("Über alles".encode() + b" \xfcber")
    with pytest.raises(ValueError, match=r"/a\.txt: not UTF-8 at byte 12;"):
        texts_of(tmp_path / "a.txt")


def test_a_jsonl_line_that_is_not_utf8_is_named(write):
    path = write("a.jsonl", [text_of(1)])
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + '{"text": "Über"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"/a\.jsonl.*(line 2.*not UTF-8|not UTF-8 at byte {size + 10})"):
        texts_of(path)


def test_a_truncated_jsonl_line_is_named(write):
    path = write("a.jsonl", [text_of(i) for i in range(3)])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"/a\.jsonl, line 3: not JSON .*truncated"):
        texts_of(path)


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ('{"id": 1, "body": "x"}', r"no text in 'text' \(data\.text_column\); given \['body', 'id'\]"),
        ('{"text": 3}', "'text' holds int, expected text"),
        ("[1]", r"no text in 'text' \(data\.text_column\); given list"),
        ("3", r"no text in 'text' \(data\.text_column\); given int"),
    ],
)
def test_a_jsonl_line_without_text_is_named(write, line, given):
    path = write("a.jsonl", [text_of(1)])
    path.write_text(path.read_text() + line)
    with pytest.raises(ValueError, match=rf"/a\.jsonl, line 2: {given}$"):
        texts_of(path)


def test_a_parquet_file_without_the_column_is_named_with_what_it_has(write):
    path = write("a.parquet", [text_of(1)], column="body")
    with pytest.raises(ValueError, match=r"/a\.parquet: no column 'text' \(data\.text_column\); .*\['id', 'body'\]"):
        texts_of(path)


@pytest.mark.parametrize(("texts", "given"), [([1, 2], "int"), ([text_of(1), None], "NoneType")])
def test_a_parquet_row_without_text_is_an_error(write, texts, given):
    with pytest.raises(ValueError, match=rf"/a\.parquet: 'text' holds {given}, expected text"):
        texts_of(write("a.parquet", texts))


@pytest.mark.parametrize("size", [100, -1])
def test_a_truncated_parquet_file_is_named(write, size):
    path = write("a.parquet", [text_of(i) for i in range(100)])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"/a\.parquet: not readable as parquet"):
        texts_of(path)


def test_a_corpus_without_a_kept_document_is_an_error(write):
    with pytest.raises(ValueError, match=r"data\.source files .*no document was kept.*'near_empty': 2"):
        texts_of(write("a.jsonl", ["short", "too"]))


def test_python_source_is_the_standard_library_without_installed_packages():
    splits, texts = zip(*Corpus(DataConfig()), strict=True)
    assert len(texts) == len(set(texts)) > 1000
    assert splits.count("val") < 0.03 * len(splits)
    assert {(STDLIB / name).read_text(encoding="utf-8") for name in ("argparse.py", "json/decoder.py")} <= set(texts)
    assert Path(pytest.__file__).read_text(encoding="utf-8") not in texts


def test_python_source_adds_installed_packages_when_asked(tmp_path, monkeypatch):
    stdlib = tmp_path / "lib"
    for i, name in enumerate(["os.py", "json/tool.py", "site-packages/a.py", "x/dist-packages/b.py", "notes.txt"]):
        (stdlib / name).parent.mkdir(parents=True, exist_ok=True)
        (stdlib / name).write_text(text_of(i))
    (stdlib / "test_bad_encoding.py").write_bytes(b"# \xff" + b"x" * 100)
    paths = {"stdlib": str(stdlib), "purelib": str(stdlib / "site-packages")}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)

    without, added = Corpus(DataConfig(val_fraction=0.5)), Corpus(DataConfig(site_packages=True))
    assert [text for _, text in without] == [text_of(1), text_of(0)]
    assert [text for _, text in added] == [text_of(1), text_of(0), text_of(2)]
    assert without.counts["not_utf8"] == added.counts["not_utf8"] == 1


@pytest.fixture
def hub(monkeypatch):
    """Stands for the Hugging Face hub: what it was asked for, and the rows that it gives."""

    class Hub:
        rows = ()

        def load_dataset(self, *args, **kwargs):
            self.asked = (args, kwargs)
            if isinstance(self.rows, Exception):
                raise self.rows
            return iter(self.rows)

    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


@pytest.mark.parametrize(("subset", "asked"), [("", None), ("en", "en")])
def test_a_hugging_face_dataset_is_streamed(hub, subset, asked):
    hub.rows = [{"id": i, "body": text_of(i)} for i in range(3)]
    config = DataConfig(
        source="huggingface", dataset="org/set", subset=subset, split="part", revision="v1", text_column="body"
    )
    assert [text for _, text in Corpus(config)] == [text_of(i) for i in range(3)]
    assert hub.asked == (("org/set", asked), {"split": "part", "revision": "v1", "streaming": True})


def test_a_hugging_face_dataset_is_read_no_further_than_needed(hub):
    hub.rows = ({"text": str(i) * 100} for i in range(10))
    assert len(list(Corpus(DataConfig(source="huggingface", max_chars=250)))) == 3
    assert len(list(hub.rows)) == 7


@pytest.mark.parametrize("error", [ConnectionError("no network\nat all"), RuntimeError(), KeyError("org/set")])
def test_a_hugging_face_dataset_that_cannot_be_opened_is_named(hub, error):
    hub.rows = error
    config = DataConfig(source="huggingface", dataset="org/set", revision="v1")
    with pytest.raises(ValueError, match=r"cannot read Hugging Face dataset 'org/set' \(revision v1\)") as caught:
        list(Corpus(config))
    assert "\n" not in str(caught.value)


def test_a_hugging_face_row_without_text_is_an_error(hub):
    hub.rows = [{"body": text_of(1)}]
    with pytest.raises(ValueError, match=r"'org/set'.*no text in 'text' .*\['body'\]"):
        list(Corpus(DataConfig(source="huggingface", dataset="org/set")))


def test_text_with_half_a_surrogate_pair_is_dropped_and_counted(write, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text_of(1) + "\ud83d"}) + "\n" + json.dumps({"text": text_of(2)}) + "\n")
    corpus = corpus_of(path)
    assert [text for _, text in corpus] == [text_of(2)]
    assert corpus.counts["not_utf8"] == 1


def test_a_name_with_brackets_is_a_name(write, tmp_path):
    (tmp_path / "b[1].txt").write_text(text_of(1))
    assert texts_of(tmp_path / "b[1].txt") == [text_of(1)]


def test_a_stream_that_breaks_off_names_the_dataset(monkeypatch):
    def rows(*args, **kwargs):
        yield {"text": text_of(1)}
        raise ConnectionResetError("peer went away")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    with pytest.raises(ValueError, match=r"'some/name'.*peer went away"):
        list(Corpus(DataConfig(source="huggingface", dataset="some/name")))
