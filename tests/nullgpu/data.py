"""Stand-ins for what a speedrun downloads: local data sets under their Hugging Face names, and a small CORE bundle.

python data.py FOLDER GKACHAT_HOME

`datasets` reads a folder of the working directory before it asks the hub for a data set of that name. So in FOLDER the
speedrun's own code reads these files through the real library. The corpus is this interpreter's standard library.
"""

import json
import os
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

CORPUS_CHARS = 16_000_000
CONVERSATIONS = 400  # of each of three data sets; with the numbers below they fill some steps of 64 rows
BUNDLE = "GKACHAT_CORE_BUNDLE"  # environment variable: another CORE bundle, a folder or a zip
CONFIGS = "configs:\n- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}\n"
TASKS = {  # label: (file, kind, shots, baseline, row)
    "copa": (
        "commonsense_reasoning/copa.jsonl", "multiple_choice", 0, 50,
        lambda i: {"query": f"{i} plus {i} is", "choices": [str(2 * i), str(2 * i + 1)], "gold": i % 2},
    ),
    "winograd": (
        "language_understanding/winograd_wsc.jsonl", "schema", 0, 50,
        lambda i: {"context_options": [f"The {i} cats", f"The {i} dogs"], "continuation": "ran.", "gold": i % 2},
    ),
    "jeopardy": (
        "world_knowledge/jeopardy_all.jsonl", "language_modeling", 10, 0,
        lambda i: {"context": f"The number after {i} is", "continuation": str(i + 1)},
    ),
}  # fmt: skip


def write_dataset(folder: Path, rows: list[dict], name: str = "default") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    (folder / "README.md").write_text(f"---\n{CONFIGS.format(name=name, path='train.parquet')}---\n")


def corpus_rows() -> list[dict]:
    """Return the files of the standard library as documents, CORPUS_CHARS characters of them."""
    rows, left = [], CORPUS_CHARS
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        text = path.read_bytes().decode(errors="replace")
        if left > 0 and "site-packages" not in path.parts:
            rows.append({"text": text})
            left -= len(text)
    return rows


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_datasets(folder: Path) -> None:
    """Write the corpus of configs/d20.toml and the three data sets of chat.source huggingface."""
    numbers = range(CONVERSATIONS)
    write_dataset(folder / "karpathy/climbmix-400b-shuffle", corpus_rows())
    count = " ".join(map(str, range(1000, 1300)))
    talk = [{"messages": [message("user", f"Count to {i}."), message("assistant", f"{i}: {count}")]} for i in numbers]
    write_dataset(folder / "HuggingFaceTB/smol-smoltalk", talk)
    choices = [{"question": f"{count} {i}?", "choices": ["A number", "B", "C", "D"], "answer": 0} for i in numbers]
    write_dataset(folder / "cais/mmlu", choices, name="auxiliary_train")
    sums = [{"question": f"{i} + {i}?", "answer": f"{count}\n#### {2 * i}"} for i in numbers]
    write_dataset(folder / "openai/gsm8k", sums, name="main")


def write_bundle(path: Path) -> None:
    """Write a bundle of three tasks, one of each kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries, table = [], ["Eval Task,Random baseline"]
    with zipfile.ZipFile(path, "w") as bundle:
        for label, (file, kind, shots, baseline, row) in TASKS.items():
            entries.append(
                f"- label: {label}\n  dataset_uri: {file}\n  num_fewshot: [{shots}]\n  icl_task_type: {kind}\n"
            )
            table.append(f"{label},{baseline}")
            bundle.writestr(f"eval_data/{file}", "".join(json.dumps(row(i)) + "\n" for i in range(16)))
        bundle.writestr("core.yaml", "icl_tasks:\n" + "".join(entries))
        bundle.writestr("eval_meta_data.csv", "\n".join(table) + "\n")


def main() -> None:
    folder, home = map(Path, sys.argv[1:3])
    write_datasets(folder)
    bundle = home / "core" / "eval_bundle.zip"
    given = os.environ.get(BUNDLE)
    if not given:
        write_bundle(bundle)
    elif Path(given).is_dir():
        shutil.make_archive(str(bundle.with_suffix("")), "zip", given)
    else:
        bundle.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(given, bundle)


if __name__ == "__main__":
    main()
