"""Which documents a source gives, which are kept, and which split they belong to."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import random
import sysconfig
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gkachat.config import DataConfig
from gkachat.data.sources import Corpus, hash_64

STDLIB = Path(sysconfig.get_paths()["stdlib"])
HUB = {"source": "huggingface", "dataset": "org/set"}


def text_of(i):
    return f"document {i}: long enough to be kept, all in all"


TEXTS = [text_of(i) for i in range(300)]


def corpus_of(*files, **options):
    return Corpus(DataConfig(source="files", files=tuple(map(str, files)), **options))


def texts_of(*files, **options):
    return [text for _, text in corpus_of(*files, **options).documents()]


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


def test_near_empty_duplicate_null_and_half_surrogate_documents_are_dropped_and_counted(write):
    kept = ["0123456789", "  0123456789\n", "漢字かな交じり文十字"]
    texts = [kept[0], "012345678", kept[1], " " * 50, kept[0], "", None, kept[2], kept[1], kept[0], None]
    texts.append("0123456789\ud83d")
    corpus = corpus_of(write("a.jsonl", texts), min_chars=10)
    for _ in range(2):  # an iteration starts over
        assert [text for _, text in corpus.documents()] == kept
        assert corpus.counts == {"kept": 3, "near_empty": 3, "duplicate": 3, "not_utf8": 1, "null": 2}


@pytest.mark.parametrize(("max_chars", "kept"), [(1, 1), (100, 1), (101, 2), (500, 5), (501, 6), (1000, 10)])
def test_reading_stops_after_max_chars(write, max_chars, kept):
    path = write("a.jsonl", ["short"] + [str(i) * 100 for i in range(10)])
    broken = write("b.txt", ["\0"])
    assert len(texts_of(path, broken, max_chars=max_chars)) == kept  # the next file is not opened


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
    ("a.csv", b"text", r"given \.csv, expected one of \.txt, \.jsonl, .*\.parquet, also compressed as \.gz"),
    ("a", b"text", "given no suffix, expected"),
    ("a.txt.gz", b"text", r"cannot be read \(Not a gzipped file"),
    ("a.txt.zst", b"text", "cannot be read .*ZSTD"),
    ("a.txt.xz", b"text", "cannot be read .*format"),
    ("a.parquet.gz", b"text", "not readable as parquet .unpack it first"),
    ("a.txt", "Über alles".encode() + b" \xfcber", "not UTF-8 at byte 12;"),
    ("a.jsonl", GOOD + '{"text": "Über"}'.encode("latin-1"), "line 2: not UTF-8 at byte 10;"),
    ("a.jsonl", GOOD + GOOD[:-10], "line 2: not JSON .*truncated"),
    ("a.jsonl", GOOD + b"[" * 200_000, r"line 2: not JSON \(nested too deeply\)$"),
    ("a.jsonl", GOOD + b'{"text": ' + b"1" * 10_000 + b"}", r"line 2: not JSON \(a number of thousands of digits\)$"),
    ("a.jsonl", GOOD + b'{"text": "x", "score": NaN}', r"line 2: not JSON \(NaN is no JSON number\)$"),
    ("a.jsonl", GOOD + b'{"text": "x", "score": -Infinity}', r"line 2: not JSON \(-Infinity is no JSON number\)$"),
    (
        "a.jsonl",
        (GOOD * 2).decode().encode("utf-16-le"),
        r"line 1: NUL characters, as in UTF-16 without .*\(iconv -f UTF-16LE",
    ),
    ("a.txt", "Über alles".encode("utf-16-le"), "not UTF-8 at byte 0; convert it to UTF-8 .iconv"),
    ("a.txt", "Above all".encode("utf-16-be"), r"NUL characters, as in UTF-16 without .*\(iconv -f UTF-16LE"),
    ("a.txt", codecs.BOM_UTF16_LE + b"odd", "not UTF-16 at byte 4; convert"),
    ("a.jsonl", codecs.BOM_UTF16_LE + b"odd", "not UTF-16-LE; convert"),
    (
        "a.jsonl",
        GOOD + b'{"id": 1, "body": "x"}',
        r"line 2: no text in 'text' \(data\.text_column\); .*'body', 'id'\]$",
    ),
    ("a.jsonl", GOOD + b'{"text": 3}', "line 2: 'text' holds int, expected text$"),
    ("a.jsonl", GOOD + b"[1]", "line 2: given a list, expected an object on each line"),
    ("a.jsonl", GOOD + b"3", r"line 2: no text in 'text' \(data\.text_column\); given int$"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_named_with_its_fault(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"/{name}[:,] {message}"):
        texts_of(tmp_path / name)


def test_a_bad_parquet_file_is_named_with_its_fault(write):
    with pytest.raises(ValueError, match=r"/a\.parquet: no text in 'text' \(data\.text_column\); .*\['body', 'id'\]"):
        texts_of(write("a.parquet", TEXTS, column="body"))
    with pytest.raises(ValueError, match=r"/b\.parquet, row 2: 'text' holds int, expected text"):
        texts_of(write("b.parquet", [None, 1]))
    broken = pyarrow.array([b"fine", b"\xff"]).cast(pyarrow.binary()).view(pyarrow.string())
    with pytest.raises(ValueError, match=r"/d\.parquet, row 2: not UTF-8"):
        texts_of(write("d.parquet", broken))
    for size in (100, -1):
        path = write("c.parquet", TEXTS)
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"/c\.parquet: not readable as parquet"):
            texts_of(path)


def test_a_corpus_without_a_kept_document_is_an_error(write):
    with pytest.raises(ValueError, match=r"data\.source files .*no document was kept; dropped: 2 near empty$"):
        list(corpus_of(write("a.jsonl", ["short", "too"])))


def test_python_source_is_the_standard_library_without_installed_packages():
    splits, texts = zip(*Corpus(DataConfig()), strict=True)
    assert len(texts) == len(set(texts)) > 1000
    assert splits.count("val") < 0.03 * len(splits)
    assert {(STDLIB / name).read_text(encoding="utf-8") for name in ("argparse.py", "json/decoder.py")} <= set(texts)
    assert Path(pytest.__file__).read_text(encoding="utf-8") not in texts


def test_python_source_names_all_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(text_of(0))
    (tmp_path / "b.py").symlink_to("nowhere")
    (tmp_path / "secret").mkdir()

    def scandir(path, real=os.scandir):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path), "purelib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"^\S+/secret: Permission denied; \S+/b\.py: No such file or directory$"):
        list(Corpus(DataConfig()))


def test_python_source_adds_installed_packages_when_asked(tmp_path, monkeypatch):
    stdlib = tmp_path / "lib"
    for i, name in enumerate(["os.py", "json/tool.py", "site-packages/a.py", "x/dist-packages/b.py", "notes.txt"]):
        (stdlib / name).parent.mkdir(parents=True, exist_ok=True)
        (stdlib / name).write_text(text_of(i))
    (stdlib / "os.py").write_bytes(codecs.BOM_UTF8 + text_of(0).encode())
    (stdlib / "test_bad_encoding.py").write_bytes(b"# \xff" + b"x" * 100)
    paths = {"stdlib": str(stdlib), "purelib": str(stdlib / "site-packages")}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    (stdlib / "loop").symlink_to(".")
    without, added = Corpus(DataConfig(val_fraction=0.5)), Corpus(DataConfig(site_packages=True))
    assert [text for _, text in without.documents()] == [text_of(1), text_of(0)]
    assert [text for _, text in added.documents()] == [text_of(1), text_of(0), text_of(2)]
    assert without.counts["not_utf8"] == added.counts["not_utf8"] == 1


@pytest.mark.parametrize(("subset", "asked"), [("", None), ("en", "en")])
def test_a_hugging_face_dataset_is_streamed_no_further_than_needed(monkeypatch, subset, asked):
    calls, numbers = [], iter(range(10))

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return ({"id": i, "body": str(i) * 100} for i in numbers)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(**HUB, subset=subset, split="part", revision="v1", text_column="body", max_chars=250)
    assert [text for _, text in Corpus(config).documents()] == [str(i) * 100 for i in range(3)]
    assert calls == [(("org/set", asked), {"split": "part", "revision": "v1", "streaming": True})]
    assert list(numbers) == [3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (None, ConnectionError("no network\nat all"), r"cannot read .* dataset 'org/set' .*'v1'\): no network$"),
        (None, RuntimeError(), r"cannot read Hugging Face dataset 'org/set' .*: RuntimeError$"),
        ({"text": text_of(1)}, ConnectionResetError("peer went away"), "cannot read .* 'org/set' .*: peer went away$"),
        ({"body": text_of(1)}, None, r"^Hugging Face dataset 'org/set', row 1: no text in 'text' .*\['body'\]$"),
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


ENCODINGS = ["utf-8-sig", "utf-16", "utf-32"]  # with byte-order marks, as Windows tools write them


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_byte_order_mark_names_the_encoding_and_is_dropped(tmp_path, encoding, suffix):
    texts = ["Über alles 漢字 \U0001f600\r\nund ein\u2028zweiter Satz, lang genug", text_of(1)]
    texts = texts[:1] if suffix == ".txt" else texts
    content = texts[0] if suffix == ".txt" else "\r\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts)
    (tmp_path / f"a{suffix}").write_bytes(content.encode(encoding))
    assert texts_of(tmp_path / f"a{suffix}") == texts


def zstd(data):
    return pyarrow.compress(data, "zstd", asbytes=True)


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)]
)
def test_compressed_files_and_suffixes_in_capitals_are_read(write, tmp_path, suffix, pack):
    plain = [write("a.jsonl", TEXTS), write("b.txt", [text_of(-1)])]
    packed = [tmp_path / f"{path.name.upper()}{suffix}" for path in plain]
    for path, to in zip(plain, packed, strict=True):
        to.write_bytes(pack(path.read_bytes()))
    assert texts_of(*packed) == texts_of(*plain) == [*TEXTS, text_of(-1)]
    packed[0].write_bytes(packed[0].read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"A.JSONL{suffix}: cannot be read"):
        texts_of(*packed)


def test_a_directory_gives_the_files_below_it_that_can_be_read(write, tmp_path):
    write("a/x.parquet", [text_of(0)])
    write("a/deep/y[1].TXT", [text_of(1)])
    write("a/deep/z.jsonl", [text_of(2)])
    for name in ("a/picture.png", "a/.hidden.txt", "a/.git/b.txt"):
        write(name, ["\0"])
    assert texts_of(tmp_path / "a") == [text_of(1), text_of(2), text_of(0)]
    (tmp_path / "b[1]" / "c").mkdir(parents=True)
    for name, fault in (
        ("b[1]", "has a suffix that is read; expected one of .txt"),
        ("*", "matches directories alone"),
    ):
        with pytest.raises(FileNotFoundError, match=fault):
            texts_of(tmp_path / name)


def test_loops_of_links_are_read_once_and_links_to_elsewhere_are_followed(write, tmp_path):
    write("a/x.txt", [text_of(0)])
    write("elsewhere/y.txt", [text_of(1)])
    for name, target in (("a/loop", "."), ("a/back", "b"), ("b", "a"), ("a/other", "../elsewhere")):
        (tmp_path / name).symlink_to(tmp_path / "a" / target if name != "b" else "a")
    corpus = corpus_of(tmp_path / "a" / "**" / "*.txt", tmp_path / "a")
    assert [text for _, text in corpus.documents()] == [text_of(1), text_of(0)]
    assert corpus.counts["duplicate"] == 2  # the two patterns
    (tmp_path / "a" / "gone.txt").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"gone\.txt: a link that leads nowhere"):
        texts_of(tmp_path / "a" / "**" / "*.txt")


def test_a_directory_that_cannot_be_read_is_named(write, tmp_path, monkeypatch):
    write("a/x.txt", [text_of(0)])
    (tmp_path / "a" / "secret").mkdir()

    def listdir(path, real=os.listdir):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    for pattern in ("a", "a/**/*.txt"):
        with pytest.raises(ValueError, match=r"^\S+a/secret: Permission denied$"):
            texts_of(tmp_path / pattern)


def test_all_bad_files_are_reported_together(write, tmp_path):
    for i in range(4):
        write(f"{i}.jsonl", TEXTS)
    (tmp_path / "1.jsonl").write_bytes(GOOD + b"{")
    write("2.jsonl", ["sound, and yet not to be read: a file before it is bad"])
    (tmp_path / "3.jsonl").write_bytes(b"{}\n{")
    seen = []
    with pytest.raises(ValueError, match=r"1\.jsonl, line 2: not JSON .*; \S*3\.jsonl, line 1: no text in") as error:
        for text in corpus_of(tmp_path / "*.jsonl").documents():
            seen.append(text)
    assert len(seen) == len(TEXTS) and "0.jsonl" not in str(error.value)  # nothing follows the first bad line
    for i in range(12):
        (tmp_path / f"{i}.csv").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"no/\*'; \S+0\.csv: given .csv.*; and 3 more$"):
        texts_of("no/*", tmp_path / "*.csv")


LINES = "".join(f"{i}: a line of the only document\n" for i in range(1000))


@pytest.mark.parametrize("val_fraction", [0.001, 0.01, 0.1, 0.5, 0.9])
def test_one_document_is_cut_at_a_line_end_and_its_end_is_val(write, val_fraction):
    corpus = corpus_of(write("a.txt", [LINES]), val_fraction=val_fraction)
    (first, train), (second, val) = corpus
    assert (first, second, corpus.cut) == ("train", "val", True)
    assert train + val == LINES and train.endswith("\n")
    assert abs(len(val) - val_fraction * len(LINES)) < 20  # half a line


@pytest.mark.parametrize("text", ["x" * 50, "title\n" + "x" * 5000, "x" * 5000 + "\nend", "0123456789" * 4 + "\n"])
def test_one_document_without_a_line_end_near_is_cut_where_the_fraction_says(write, text):
    (_, train), (_, val) = corpus_of(write("a.txt", [text]), val_fraction=0.1)
    assert train + val == text and len(val) == round(0.1 * len(text))


def test_a_corpus_that_hashes_leave_without_val_or_train_has_both_and_no_other_changes(write):
    *texts, last = TEXTS[:6]  # their hashes put all six into train below 0.11, into val above 0.74
    for fraction, parts in {
        1e-9: [("train", last[:-1]), ("val", last[-1:])],
        0.03: [("train", last[:-8]), ("val", last[-8:])],  # 8 of 276 characters
        0.97: [("train", last[:8]), ("val", last[8:])],
        0.75: [("train", last)],  # less than a quarter of all characters, which train should have
    }.items():
        corpus = corpus_of(write("a.jsonl", [*texts, last]), val_fraction=fraction)
        others = "train" if fraction < 0.5 else "val"
        assert list(corpus) == [*((others, text) for text in texts), *parts] and corpus.cut
    in_train = [text for text in TEXTS if hash_64(text.encode()) > 0.5 * 2**64][:9]
    assert list(corpus_of(write("a.jsonl", in_train), val_fraction=0.15))[-2:] == [
        ("train", in_train[-2]),
        ("val", in_train[-1]),  # less than the share that val should have
    ]
    corpus = corpus_of(write("a.jsonl", TEXTS), val_fraction=0.3)
    assert list(corpus) == list(corpus.documents()) and not corpus.cut
