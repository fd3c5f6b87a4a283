"""Which documents a source gives, which are kept, and which split they belong to."""

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
HUB = {"source": "huggingface", "dataset": "org/set"}


def text_of(i):
    return f"document {i}: long enough to be kept, all in all"


TEXTS = [text_of(i) for i in range(300)]


def corpus_of(*files, **options):
    return Corpus(DataConfig(source="files", files=tuple(map(str, files)), **options))


def texts_of(*files, **options):
    return [text for _, text in corpus_of(*files, **options)]


@pytest.fixture
def write(tmp_path):
    """Function that writes texts to a .txt, .jsonl or .parquet file and returns its path."""

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
    path = write("all.jsonl", TEXTS)
    splits = {text: split for split, text in corpus_of(path, val_fraction=0.3)}
    assert set(splits) == set(TEXTS) and set(splits.values()) == {"train", "val"}
    assert all(splits[text] == "val" for split, text in corpus_of(path, val_fraction=0.1) if split == "val")
    shuffled = random.Random(0).sample(TEXTS, k=len(TEXTS))
    for name, texts in (("b.jsonl", shuffled), ("c.parquet", shuffled[::7])):
        assert list(corpus_of(write(name, texts), val_fraction=0.3)) == [(splits[text], text) for text in texts]


def test_the_share_of_val_is_about_val_fraction(write):
    path, n = write("a.jsonl", map(text_of, range(5000))), 5000
    for p in (0.01, 0.1, 0.5):
        n_val = sum(split == "val" for split, _ in corpus_of(path, val_fraction=p))
        assert abs(n_val - n * p) < 4 * (n * p * (1 - p)) ** 0.5  # 4 standard deviations


def test_near_empty_duplicate_and_half_surrogate_documents_are_dropped_and_counted(write):
    kept = ["0123456789", "  0123456789\n", "漢字かな交じり文十字"]
    texts = [kept[0], "012345678", kept[1], " " * 50, kept[0], "", kept[2], kept[1], kept[0], "0123456789\ud83d"]
    corpus = corpus_of(write("a.jsonl", texts), min_chars=10)
    for _ in range(2):  # an iteration starts over
        assert [text for _, text in corpus] == kept
        assert corpus.counts == {"kept": 3, "near_empty": 3, "duplicate": 3, "not_utf8": 1}


@pytest.mark.parametrize(("max_chars", "kept"), [(1, 1), (100, 1), (101, 2), (500, 5), (501, 6), (1000, 10)])
def test_reading_stops_after_max_chars(write, max_chars, kept):
    path = write("a.jsonl", ["short"] + [str(i) * 100 for i in range(10)])
    assert len(texts_of(path, "none.txt", max_chars=max_chars)) == kept  # the next file is not opened


def test_a_txt_file_is_one_document_as_it_stands(write):
    text = "erste Zeile: Über\r\n\r\nzweite Zeile: \x0c漢字\u2028dritte\n"
    assert texts_of(write("a.txt", [text])) == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_jsonl_file_has_a_document_a_line_and_a_parquet_file_one_a_row(write, name):
    texts = [*TEXTS, "one line\nand another, in one document", "Über 漢字 \U0001f600\r\n " * 4]
    path = write(name, texts, column="content")
    if name == "a.jsonl":  # blank lines are no documents
        path.write_text(path.read_text().replace("\n", "\n\n  \n"))
    assert texts_of(path, text_column="content") == texts


def test_globs_match_in_sorted_order_and_patterns_in_theirs(write, tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "deep/d.txt", "e.jsonl", "f[1].txt"):
        write(name, [f"{name}: long enough to be kept, all in all"])
    (tmp_path / "directory.txt").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))

    def names(*patterns):
        return [text.split(":")[0] for text in texts_of(*(f"{tmp_path}/{pattern}" for pattern in patterns))]

    assert names("?.txt") == ["a.txt", "b.txt"]
    assert names("**/?.txt") == ["a.txt", "b.txt", "deep/d.txt", "deep/er/c.txt"]
    assert names("e.jsonl", "?.txt") == ["e.jsonl", "a.txt", "b.txt"]
    assert names("b.txt", "?.txt") == ["b.txt", "a.txt"]
    assert names("f[1].txt") == ["f[1].txt"]  # a file of this name comes before what the pattern matches
    assert len(texts_of("~/?.txt")) == 2


def test_a_pattern_that_matches_nothing_is_named(write, tmp_path):
    write("a.txt", [text_of(1)])
    for pattern in ("b.txt", "*.jsonl"):
        with pytest.raises(FileNotFoundError) as error:
            texts_of(tmp_path / "a.txt", tmp_path / pattern)
        assert str(error.value) == f"data.files: nothing matches {str(tmp_path / pattern)!r}"


GOOD = json.dumps({"text": text_of(1)}).encode() + b"\n"
BAD_FILES = [
    ("a.txt", b"", "the file is empty$"),
    ("a.jsonl", b"", "the file is empty$"),
    ("a.parquet", b"", "the file is empty$"),
    ("a.csv", b"text", r"given \.csv, expected one of \.txt, \.jsonl, \.parquet$"),
    ("a", b"text", "given no suffix, expected"),
    ("a.txt.gz", b"text", r"given \.gz, expected"),
    ("a.txt", "Über alles".encode() + b" \xfcber", "not UTF-8 at byte 12;"),
    ("a.jsonl", GOOD + '{"text": "Über"}'.encode("latin-1"), "line 2: not UTF-8 at byte 10 of the line"),
    ("a.jsonl", GOOD + GOOD[:-10], "line 2: not JSON .*truncated"),
    ("a.jsonl", GOOD + b"[" * 100_000, "line 2: not JSON"),
    (
        "a.jsonl",
        GOOD + b'{"id": 1, "body": "x"}',
        r"line 2: no text in 'text' \(data\.text_column\); .*'body', 'id'\]$",
    ),
    ("a.jsonl", GOOD + b'{"text": 3}', "line 2: 'text' holds int, expected text$"),
    ("a.jsonl", GOOD + b"[1]", r"line 2: no text in 'text' \(data\.text_column\); given list$"),
    ("a.jsonl", GOOD + b"3", r"line 2: no text in 'text' \(data\.text_column\); given int$"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_named_with_its_fault(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"/{name}[:,] {message}"):
        texts_of(tmp_path / name)


def test_a_bad_parquet_file_is_named_with_its_fault(write):
    with pytest.raises(ValueError, match=r"/a\.parquet: no column 'text' \(data\.text_column\); .*\['id', 'body'\]"):
        texts_of(write("a.parquet", TEXTS, column="body"))
    for texts, given in (([1, 2], "int"), ([text_of(1), None], "NoneType")):
        with pytest.raises(ValueError, match=rf"/b\.parquet: 'text' holds {given}, expected text"):
            texts_of(write("b.parquet", texts))
    for size in (100, -1):
        path = write("c.parquet", TEXTS)
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"/c\.parquet: not readable as parquet"):
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


@pytest.mark.parametrize(("subset", "asked"), [("", None), ("en", "en")])
def test_a_hugging_face_dataset_is_streamed_no_further_than_needed(monkeypatch, subset, asked):
    calls, numbers = [], iter(range(10))

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return ({"id": i, "body": str(i) * 100} for i in numbers)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(**HUB, subset=subset, split="part", revision="v1", text_column="body", max_chars=250)
    assert [text for _, text in Corpus(config)] == [str(i) * 100 for i in range(3)]
    assert calls == [(("org/set", asked), {"split": "part", "revision": "v1", "streaming": True})]
    assert list(numbers) == [3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (None, ConnectionError("no network\nat all"), r"cannot read .* dataset 'org/set' .*'v1'\): no network$"),
        (None, RuntimeError(), r"cannot read Hugging Face dataset 'org/set' .*: RuntimeError$"),
        ({"text": text_of(1)}, ConnectionResetError("peer went away"), "cannot read .* 'org/set' .*: peer went away$"),
        ({"body": text_of(1)}, None, r"^Hugging Face dataset 'org/set': no text in 'text' .*\['body'\]$"),
    ],
)
def test_a_hugging_face_dataset_that_cannot_be_read_is_named(monkeypatch, row, error, message):
    def load_dataset(*_, **__):
        if row is not None:
            yield row
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=message):
        list(Corpus(DataConfig(**HUB, revision="v1")))
