"""nanochat's CORE bundle: what its 22 tasks are, their rows, and the prompts made of them.

    for task in read_bundle("eval_bundle.zip"):             # or a directory: core.yaml, eval_meta_data.csv, eval_data/
        prompts(task, 0)

A bundle comes from elsewhere and is not trusted: nothing is unpacked to disk, and no more is read than LARGEST.
"""

import csv
import hashlib
import io
import json
import random
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkachat.config import home
from gkachat.eval.download import download

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
# Its host publishes none; several projects that pin the file, independently of each other, have recorded this one.
SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"
TASKS = [
    "hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa",
    "commonsense_qa", "piqa", "openbook_qa", "lambada_openai", "hellaswag", "winograd", "winogrande",
    "bigbench_dyck_languages", "agi_eval_lsat_ar", "bigbench_cs_algorithms", "bigbench_operators",
    "bigbench_repeat_copy_logic", "squad", "coqa", "boolq", "bigbench_language_identification",
]  # fmt: skip
LARGEST = 2**29  # bytes that are read of a bundle, unpacked: the real one's 22 tasks are a fraction of this
FIELDS = {  # of a row, by a task's kind: texts, and lists of texts
    "multiple_choice": (("query",), "choices"),
    "schema": (("continuation",), "context_options"),
    "language_modeling": (("context", "continuation"), None),
}


@dataclass(frozen=True)
class Task:
    label: str
    kind: str
    file: str
    shots: int
    delimiter: str
    baseline: float
    """What guessing gets right, 0 to 1."""
    rows: list[dict[str, Any]]
    """In the order of evaluation, cut to max_per_task."""
    n_rows: int
    """Before the cut."""
    sha256: str
    """Of all that the result depends on, the model aside."""


def fetch_bundle(report: Callable[[str], None] = print) -> Path:
    """nanochat's bundle, from the web the first time. OSError where that fails, or the file is another by now."""
    path = home() / "core" / "eval_bundle.zip"
    if not path.exists():
        report(f"downloading {URL}")
    try:
        return download(URL, path, SHA256, report=report)
    except OSError as error:
        raise OSError(f"{error}; have the bundle elsewhere? --bundle PATH takes a directory or a zip") from None


def read_bundle(path: str | Path, max_per_task: int | None = None) -> list[Task]:
    """The tasks of a bundle: core.yaml, eval_meta_data.csv, eval_data/. A task whose file is not there is left out.

    Nothing is unpacked to disk. Raises ValueError naming file and line for what is not as it should be, and for more
    than LARGEST bytes; FileNotFoundError where there is no bundle.
    """
    import yaml

    if max_per_task is not None and max_per_task < 1:
        raise ValueError(f"max_per_task: given {max_per_task}, expected 1 or more")
    read = _reader(Path(path))
    try:
        tree = yaml.safe_load(read("core.yaml", 2**20))
        listed = [_task_of(entry) for entry in tree["icl_tasks"]]
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: core.yaml cannot be read: {' '.join(str(error).split())[:300]}") from None
    try:
        table = csv.DictReader(io.StringIO(read("eval_meta_data.csv", 2**20).decode()))
        baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in table}
    except (csv.Error, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: eval_meta_data.csv cannot be read: {error!r}"[:300]) from None
    tasks = []
    for label, kind, file, shots, delimiter in listed:
        if not 0 <= baselines.get(label, -1) < 1:
            raise ValueError(f"{path}: eval_meta_data.csv: expected a Random baseline from 0 to below 100 for {label}")
        try:
            data = read(f"eval_data/{file}", LARGEST)
        except FileNotFoundError:
            continue
        rows = _rows(f"{path}: {file}", data, kind)
        n_rows = len(rows)
        random.Random(1337).shuffle(rows)
        rows = rows[:max_per_task]
        if len(rows) <= shots:
            raise ValueError(f"{path}: {file}: given {len(rows)} rows, expected more than its {shots} shots")
        digest = hashlib.sha256(repr((label, kind, shots, delimiter, baselines[label], len(rows))).encode() + data)
        tasks.append(
            Task(label, kind, file, shots, delimiter, baselines[label], rows, n_rows, digest.hexdigest())
        )  # fmt: skip
    if not tasks:
        raise ValueError(f"{path}: none of the tasks in core.yaml has a file in eval_data/")
    return tasks


def _reader(path: Path) -> Callable[[str, int], bytes]:
    """Reads files of a bundle: a directory, or a zip, which may hold it in a folder."""
    left = LARGEST

    def checked(name: str, data: bytes, most: int) -> bytes:
        nonlocal left
        if len(data) > min(most, left):
            raise ValueError(f"{path}: {name} makes it more than {min(most, left):,} bytes, which is all that is read")
        left -= len(data)
        return data

    if path.is_dir():
        root = path if (path / "core.yaml").exists() else path / "eval_bundle"
        if not (root / "core.yaml").exists():
            raise FileNotFoundError(f"{path}: no core.yaml; expected the directory, or zip, of nanochat's eval_bundle")

        def read(name: str, most: int) -> bytes:
            file = (root / name).resolve()
            if not file.is_relative_to(root.resolve()):
                raise ValueError(f"{path}: {name[:200]} lies outside the bundle")
            with open(file, "rb") as opened:
                return checked(name, opened.read(min(most, left) + 1), most)

    else:
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}: expected a bundle's directory or zip ({error})") from None
        roots = [n.removesuffix("core.yaml") for n in archive.namelist() if f"/{n}".endswith("/core.yaml")]
        root_name = min(roots, key=len, default="")

        def read(name: str, most: int) -> bytes:
            try:
                with archive.open(root_name + name) as member:  # what it claims to unpack to is not believed
                    return checked(name, member.read(min(most, left) + 1), most)
            except KeyError:
                raise FileNotFoundError(f"{path}: no {root_name + name}"[:300]) from None
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
                raise ValueError(f"{path}: {name[:200]} cannot be unpacked: {error}") from None

    return read


def _task_of(entry: dict[str, Any]) -> tuple[str, str, str, int, str]:
    label, kind, file = entry["label"], entry["icl_task_type"], entry["dataset_uri"]
    (shots,), delimiter = entry["num_fewshot"], entry.get("continuation_delimiter", " ")
    if not all(isinstance(text, str) for text in (label, file, delimiter)) or type(shots) is not int or shots < 0:
        raise ValueError("expected label, dataset_uri and continuation_delimiter to be texts, num_fewshot a number")
    if kind not in FIELDS:
        raise ValueError(f"{label}: icl_task_type is not one of {', '.join(FIELDS)}")
    return label, kind, file, shots, delimiter


def _rows(where: str, data: bytes, kind: str) -> list[dict[str, Any]]:
    texts, options = FIELDS[kind]
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if missing := [name for name in texts if not isinstance(row[name], str)]:
                raise TypeError(f"{missing[0]} is not a text")
            if options is None and not row["continuation"].strip():
                raise ValueError("nothing is to be continued")
            if options is not None:
                found, gold = row[options], row["gold"]
                if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
                    raise TypeError(f"{options} is not a list of texts")
                if type(gold) is not int or not 0 <= gold < len(found):
                    raise ValueError(f"gold is no index of {options}")
        except KeyError as error:
            raise ValueError(f"{where}, line {number}: no {error}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{where}, line {number}: {error}"[:500]) from None
        rows.append(row)
    return rows


def prompts(task: Task, index: int) -> list[str]:
    """The texts to be scored for a row; in language modelling, its prompt and that with the continuation."""
    others = [i for i in range(len(task.rows)) if i != index]
    shots = [task.rows[i] for i in random.Random(1234 + index).sample(others, task.shots)] if task.shots else []
    row, d = task.rows[index], task.delimiter
    if task.kind == "multiple_choice":
        head = "".join(f"{shot['query']}{d}{shot['choices'][shot['gold']]}\n\n" for shot in shots)
        return [f"{head}{row['query']}{d}{choice}" for choice in row["choices"]]
    if task.kind == "schema":
        head = "".join(f"{shot['context_options'][shot['gold']]}{d}{shot['continuation']}\n\n" for shot in shots)
        return [f"{head}{context}{d}{row['continuation']}" for context in row["context_options"]]
    head = "".join(f"{shot['context'].strip()}{d}{shot['continuation']}\n\n" for shot in shots)
    prompt = f"{head}{row['context'].strip()}{d}"
    return [prompt.strip(), prompt + row["continuation"]]
