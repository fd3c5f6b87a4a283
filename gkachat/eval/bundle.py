"""nanochat's CORE bundle: its 22 tasks, their rows, and the few-shot prompts made of them.

    tasks, unscored = read_bundle("eval_bundle.zip")        # or a directory: core.yaml, eval_meta_data.csv, eval_data/
    make_prompts(tasks[0], 0)

A bundle comes from elsewhere and is not trusted: nothing is unpacked to disk, and at most MAX_BYTES of a file are read.
"""

import csv
import hashlib
import io
import json
import random
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gkachat.config import home
from gkachat.eval.download import download
from gkachat.text import list_some

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
# The host publishes no hash. Several projects that pin the file have recorded this one independently.
SHA256 = "90a7c19e28ee7a52b4f6e1f87658deb9fde7f63deba2379045bdb1fe9ea5d200"
TASKS = [
    "hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa",
    "commonsense_qa", "piqa", "openbook_qa", "lambada_openai", "hellaswag", "winograd", "winogrande",
    "bigbench_dyck_languages", "agi_eval_lsat_ar", "bigbench_cs_algorithms", "bigbench_operators",
    "bigbench_repeat_copy_logic", "squad", "coqa", "boolq", "bigbench_language_identification",
]  # fmt: skip
MAX_BYTES = 2**28  # of one unpacked file; those of the real bundle are much smaller
FIELDS = {  # by the task's kind: the text fields of a row, and its field with a list of texts
    "multiple_choice": (("query",), "choices"),
    "schema": (("continuation",), "context_options"),
    "language_modeling": (("context", "continuation"), None),
}


@dataclass(frozen=True)
class Task:
    """One task of a bundle."""

    label: str
    kind: str
    """multiple_choice, schema or language_modeling."""
    shots: int
    """Examples in a prompt."""
    delimiter: str
    baseline: float
    """Accuracy of guessing, 0 to 1."""
    rows: list[dict[str, Any]]
    """All rows, in the order of evaluation."""
    n_scored: int
    """Number of rows that are scored, the first ones. The others serve as few-shot examples."""
    sha256: str
    """Hash of everything that the result depends on, except the model."""


def fetch_bundle() -> Path:
    """Return the path of nanochat's bundle, and download it the first time. Raises OSError when that fails."""
    path = home() / "core" / "eval_bundle.zip"
    if not path.exists():
        print(f"downloading {URL}")
        try:
            download(URL, path, SHA256)
        except OSError as error:
            raise OSError(f"{error}; --bundle PATH reads a directory or a zip") from None
    return path


def read_bundle(path: str | Path, max_per_task: int | None = None) -> tuple[list[Task], list[str]]:
    """Read a bundle: core.yaml, eval_meta_data.csv, eval_data/. Return its tasks, and "task: why it cannot be scored".

    `max_per_task` limits the rows of a task that are scored. Tasks without a file in eval_data/ are left out.

    Raises ValueError for a core.yaml or eval_meta_data.csv that cannot be read, or where no task can be scored;
    FileNotFoundError when there is no bundle.
    """
    import yaml

    if max_per_task is not None and max_per_task < 1:
        raise ValueError(f"max_per_task: given {max_per_task}, expected 1 or more")
    read = _open_bundle(Path(path))
    with _errors_name(f"{path}: core.yaml", yaml.YAMLError):
        entries = [_parse_entry(entry) for entry in yaml.safe_load(read("core.yaml"))["icl_tasks"]]
    with _errors_name(f"{path}: eval_meta_data.csv", csv.Error):
        table = csv.DictReader(io.StringIO(read("eval_meta_data.csv").decode()))
        baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in table}
    tasks, unscored = [], []
    for label, kind, file, shots, delimiter in entries:
        try:
            data = read(f"eval_data/{file}")
            baseline = baselines.get(label, -1)
            if not 0 <= baseline < 1:
                raise ValueError("eval_meta_data.csv: expected a Random baseline from 0 to below 100")
            rows = _parse_rows(data, kind, file)
            if len(rows) <= shots:
                raise ValueError(f"{file}: given {len(rows)} rows, expected more than its {shots} shots")
        except FileNotFoundError:
            continue
        except ValueError as error:
            unscored.append(f"{label}: {error}")
            continue
        random.Random(1337).shuffle(rows)
        n_scored = min(len(rows), max_per_task or len(rows))
        rules = repr((label, kind, shots, delimiter, baseline, n_scored))
        digest = hashlib.sha256(rules.encode() + data).hexdigest()
        tasks.append(Task(label, kind, shots, delimiter, baseline, rows, n_scored, digest))
    if not tasks:
        raise ValueError(f"{path}: {list_some(unscored) or 'none of the tasks in core.yaml has a file in eval_data/'}")
    return tasks, unscored


def make_prompts(task: Task, index: int) -> list[str]:
    """Return the texts to score for row `index`, each with its few-shot examples, by nanochat's rules.

    These are one text per choice; in language modelling, the prompt, and the prompt with its continuation.
    """
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


def _open_bundle(path: Path) -> Callable[[str], bytes]:
    """Return a function from file names to contents; a directory or zip may hold them in a folder eval_bundle."""
    try:
        root = path if path.is_dir() else zipfile.Path(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: expected a bundle's directory or zip ({error})") from None
    if not (root / "core.yaml").exists():
        root = root / "eval_bundle"
    if not (root / "core.yaml").exists():
        raise FileNotFoundError(f"{path}: no core.yaml; expected the directory, or zip, of nanochat's eval_bundle")

    def read(name: str) -> bytes:
        file = root / name
        if isinstance(root, Path) and not file.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{name[:200]} lies outside the bundle")
        try:
            with file.open("rb") as opened:  # stops at the limit, whatever size a zip claims
                data = opened.read(MAX_BYTES + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{name[:200]} cannot be unpacked: {error}") from None
        if len(data) > MAX_BYTES:
            raise ValueError(f"{name[:200]} has more than {MAX_BYTES:,} bytes, the most that is read")
        return data

    return read


@contextmanager
def _errors_name(where: str, *more: type[Exception]) -> Iterator[None]:
    """Turn errors of parsing, `more` types among them, into a short ValueError that says where."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{where}: no {error}") from None
    except (ValueError, TypeError, RecursionError, *more) as error:
        raise ValueError(f"{where} cannot be read: {' '.join(str(error).split())[:300]}") from None


def _parse_entry(entry: dict[str, Any]) -> tuple[str, str, str, int, str]:
    """Return label, kind, file, shots and delimiter of an entry of core.yaml."""
    label, kind, file = entry["label"], entry["icl_task_type"], entry["dataset_uri"]
    (shots,), delimiter = entry["num_fewshot"], entry.get("continuation_delimiter", " ")
    if not all(isinstance(text, str) for text in (label, file, delimiter)) or type(shots) is not int or shots < 0:
        raise ValueError("expected label, dataset_uri and continuation_delimiter to be texts, num_fewshot a number")
    return label, str(kind), file, shots, delimiter


def _parse_rows(data: bytes, kind: str, file: str) -> list[dict[str, Any]]:
    """Return the rows of a task's file. Raises ValueError that names file and line for anything malformed."""
    if kind not in FIELDS:
        raise ValueError(f"icl_task_type is not one of {', '.join(FIELDS)}")
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            with _errors_name(f"{file}, line {number}"):
                rows.append(_parse_row(line, kind))
    return rows


def _parse_row(line: bytes, kind: str) -> dict[str, Any]:
    row, (texts, options) = json.loads(line), FIELDS[kind]
    if wrong := [name for name in texts if not isinstance(row[name], str)]:
        raise ValueError(f"{wrong[0]} is not a text")
    if options is None:
        if not row["continuation"].strip():
            raise ValueError("nothing is to be continued")
        return row
    choices, gold = row[options], row["gold"]
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
        raise ValueError(f"{options} is not a list of texts")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError(f"gold is no index of {options}")
    return row
