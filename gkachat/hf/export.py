"""A run's checkpoint as a directory that Hugging Face's libraries read, without gkachat.

export(find_run("d4_gka"), Path("out"))
AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)

Names and numbers of the tensors are the checkpoint's. gkachat/hf/ has the sources that are copied beside them.
"""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gkachat.checkpoint import load_model, remove
from gkachat.config import GPTConfig
from gkachat.eval.results import read_results
from gkachat.files import flush, read_json, write_text
from gkachat.model.gpt import GPT
from gkachat.model.stats import model_stats
from gkachat.tokenizer import BOS, Tokenizer

EXPORTED = ("softmax", "gka", "gka_plus")  # what the exported sources know, softmax without short convolutions
NOT_EXPORTED = ("key_delays", "value_embeddings")  # of gka_plus: where training starts; layers with them are listed
SOURCES = ("configuration_gkachat.py", "modeling_gkachat.py")
END_OF_ANSWER = "<|assistant_end|>"
CHAT_TEMPLATE = (  # what gkachat.data.conversations renders
    "{{ bos_token }}{% set ns = namespace(before='', turn=0) %}{% for message in messages %}"
    "{% if message.role == 'system' and loop.first and not loop.last %}{% set ns.before = message.content + '\\n\\n' %}"
    "{% else %}{% if message.role != ['user', 'assistant'][ns.turn % 2] %}"
    "{{ raise_exception('messages: expected turns of user and assistant, one system message before them') }}{% endif %}"
    "{{ '<|' + message.role + '_start|>' + ns.before + message.content + '<|' + message.role + '_end|>' }}"
    "{% set ns.before = '' %}{% set ns.turn = ns.turn + 1 %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}"
)


def export(
    run_dir: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the last checkpoint, or that of `step`, to `out`, completely or not at all; returns its config.json.

    Args:
        dtype: float32 or bfloat16, of embeddings and matrices; bandwidths and scales stay float32.
        max_shard_size: like "5GB"; larger models are split into files with an index.
        overwrite: take the place of an earlier export.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        ValueError: a checkpoint that is damaged, or options that cannot be.
        OSError: `out` is in use, or cannot be written.
    """
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype: given {dtype!r}, expected float32 or bfloat16")
    out = Path(out).resolve()
    _check_free(out, overwrite)
    model, tokenizer, meta = load_model(run_dir, step=step)
    if model.config.attention not in EXPORTED or model.config.short_conv:
        what = f"{model.config.attention} attention{' with short_conv' if model.config.short_conv else ''}"
        raise ValueError(f"{run_dir}: given {what}, expected {', '.join(EXPORTED)}, without short_conv")
    tensors = {name: t.to(getattr(torch, dtype)) if t.ndim > 1 else t for name, t in model.state_dict().items()}
    files = _settings(model, tokenizer, meta, dtype)
    config = files["config.json"]
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        save_torch_state_dict(tensors, temporary, max_shard_size=max_shard_size, metadata={"format": "pt"})
        texts = {name: (Path(__file__).parent / "hf" / name).read_text() for name in SOURCES}
        texts |= {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
        texts |= {"tokenizer.json": tokenizer.json_text, "README.md": _card(run_dir, model.config, meta, config)}
        for name, text in texts.items():
            write_text(temporary / name, text)
        for path in temporary.glob("*.safetensors"):  # which are written for their owner alone
            shutil.copymode(temporary / "config.json", path)
            flush(path)
        if overwrite and out.exists():
            remove(out)
        os.replace(temporary, out)
        with suppress(OSError):  # the export is in place; not every file system flushes directories
            flush(out.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return config


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{out} exists and is not empty; choose another place, or give --overwrite")
    with suppress(ValueError):
        if read_json(out / "config.json", model_type=str)["model_type"] == "gkachat":
            return
    raise FileExistsError(f"{out} is not an earlier export, and is not overwritten; choose another place")


def _settings(model: GPT, tokenizer: Tokenizer, meta: dict[str, Any], dtype: str) -> dict[str, dict[str, Any]]:
    """What transformers reads about the model, about generating with it, and about its tokenizer."""
    shape, names = model.config, model.state_dict().keys()
    windows = [shape.window(layer) for layer in range(shape.depth)]
    bos, end, answers = tokenizer.bos, tokenizer.special[END_OF_ANSWER], "chat" in meta["config"]
    ids = {"bos_token_id": bos, "eos_token_id": [end, bos] if answers else bos, "pad_token_id": bos}
    config = {
        "model_type": "gkachat",
        "architectures": ["GkachatForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_gkachat.GkachatConfig",
            "AutoModelForCausalLM": "modeling_gkachat.GkachatForCausalLM",
        },
        "dtype": dtype,
        "attention": shape.attention,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.n_embd,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.n_head,
        "max_position_embeddings": shape.sequence_len,
        "window": next(filter(None, windows), None),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "value_embedding_layers": [i for i in range(shape.depth) if f"blocks.{i}.attn.value_embedding.weight" in names],
        "gka_rope": shape.gka.rope,
        "gka_include_self": shape.gka.include_self,
        "gka_normalize": shape.gka.normalize,
        "plus": {name: value for name, value in asdict(shape.plus).items() if name not in NOT_EXPORTED},
        **ids,
    }
    unused = list(range(tokenizer.vocab_size, shape.vocab_size))  # rows of the head that no token belongs to
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.sequence_len,
        "bos_token": BOS,
        "eos_token": END_OF_ANSWER if answers else BOS,
        "pad_token": BOS,
        "additional_special_tokens": list(tokenizer.special),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = ids | ({"suppress_tokens": unused} if unused else {})
    return {"config.json": config, "generation_config.json": generation, "tokenizer_config.json": tokens}


def _card(run_dir: Path, shape: GPTConfig, meta: dict[str, Any], config: dict[str, Any]) -> str:
    """README.md: what the model is, how it was made, what it scores, how to load it."""
    stored, counted = meta["config"], model_stats(shape)
    data, train, chat = stored["data"], stored["train"], stored.get("chat")
    options = [name for name in ("rope", "normalize") if config[f"gka_{name}"]]
    options += [] if config["gka_include_self"] else ["without itself"]
    source = data["dataset"] if data["source"] == "huggingface" else data["source"]
    facts = {
        "attention": ", ".join([shape.attention, *options]),
        "layers, channels, heads": f"{shape.depth}, {shape.n_embd:,}, {shape.n_head} of {shape.head_dim}",
        "context, windows": f"{shape.sequence_len:,} tokens, {shape.window_pattern}",
        **{f"parameters: {name.replace('_', ' ')}": f"{n:,}" for name, n in counted.params.items()},
        "training FLOPs a token": f"{counted.flops_per_token:,}",
        "decode cache, bytes a token": f"{counted.cache_bytes_per_token:,} in bfloat16",
        "trained on": source + (f"; {chat['base']} tuned on {chat['source']} conversations" if chat else ""),
        "batch, protocol, seed": f"{train['total_batch_size']}, {train['protocol']}, {stored['run']['seed']}",
        **{name: meta[name] for name in ("step", "tokens", "seconds", "device", "dtype", "version") if name in meta},
        **_scores(Path(run_dir), meta["step"]),
    }
    ask = CHAT if chat else 'inputs = tokenizer(tokenizer.bos_token + "def add(", return_tensors="pt")'
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return CARD.format(name=Path(run_dir).resolve().name, attention=shape.attention, ask=ask, rows=rows)


def _scores(run_dir: Path, step: int) -> dict[str, str]:
    """What evaluations of this very checkpoint left in the run's directory."""
    found = {}
    for kind, report in read_results(run_dir, step).items():
        found |= {f"{kind}: {name}": f"{value:.4f}" for name, value in report.items() if isinstance(value, float)}
        for task, score in (report.get("scores") or {}).items():
            if isinstance(score, dict) and isinstance(score.get("accuracy"), int | float):
                found[f"{kind}: {task}, accuracy"] = f"{score['accuracy']:.4f}"
    return found


CHAT = """messages = [{"role": "user", "content": "What is 2 + 2?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""

CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: [gkachat, {attention}]
---

# {name}

A small GPT trained with gkachat. Its attention is `{attention}`; gka is Gaussian Kernel Attention (arXiv 2605.02144).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "..."  # this directory; its .py files are the model
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
{ask}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

Every text begins with `<|bos|>`; the tokenizer adds it in its chat template only. Text that spells a special token is
read as that token. For text that others wrote, give `split_special_tokens=True` to the tokenizer, or
`sanitize_control_tokens=True` to its chat template, which transformers 5.24 has and 5.0 passes over in silence.
Texts packed into one row, and static caches, are refused.

| | |
| --- | --- |
{rows}

Code and weights are under the MIT License. What the model was trained on has terms of its own.
"""
