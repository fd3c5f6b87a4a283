"""The model card of an export: its README.md."""

from pathlib import Path
from typing import Any

from gkachat.config import GPTConfig
from gkachat.eval.results import read_results
from gkachat.model.stats import model_stats

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
{usage}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

Every text begins with `<|bos|>`, which the tokenizer adds only in its chat template. Text that spells a special token
is read as that token. For untrusted text, give `split_special_tokens=True` to the tokenizer, or
`sanitize_control_tokens=True` to its chat template, which transformers 5.24 has and 5.0 silently ignores.
Texts packed into one row and static caches are refused.

| | |
| --- | --- |
{rows}

Code and weights are under the MIT License. The training data has terms of its own.
"""

BASE_USAGE = 'inputs = tokenizer(tokenizer.bos_token + "def add(", return_tensors="pt")'
CHAT_USAGE = """messages = [{"role": "user", "content": "What is 2 + 2?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""


def model_card(run_dir: Path, shape: GPTConfig, meta: dict[str, Any]) -> str:
    """Return the card: what the model is, how it was trained, how it scores and how to load it."""
    stored, stats = meta["config"], model_stats(shape)
    data, train, chat = stored["data"], stored["train"], stored.get("chat")
    options = [name for name in ("rope", "normalize") if getattr(shape.gka, name)]
    options += [] if shape.gka.include_self else ["without self"]
    source = data["dataset"] if data["source"] == "huggingface" else data["source"]
    facts = {
        "attention": ", ".join([shape.attention, *(options if shape.attention == "gka" else [])]),
        "layers, channels, heads": f"{shape.depth}, {shape.n_embd:,}, {shape.n_head} of {shape.head_dim}",
        "context, windows": f"{shape.sequence_len:,} tokens, {shape.window_pattern}",
        **{f"parameters: {name.replace('_', ' ')}": f"{n:,}" for name, n in stats.params.items()},
        "training FLOPs per token": f"{stats.flops_per_token:,}",
        "decode cache, bytes per token": f"{stats.cache_bytes_per_token:,} in bfloat16",
        "trained on": source + (f"; {chat['base']} tuned on {chat['source']} conversations" if chat else ""),
        "batch, protocol, seed": f"{train['total_batch_size']}, {train['protocol']}, {stored['run']['seed']}",
        **{name: meta[name] for name in ("step", "tokens", "seconds", "device", "dtype", "version") if name in meta},
        **_scores(run_dir, meta["step"]),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    usage = CHAT_USAGE if chat else BASE_USAGE
    return CARD.format(name=run_dir.resolve().name, attention=shape.attention, usage=usage, rows=rows)


def _scores(run_dir: Path, step: int) -> dict[str, str]:
    """Return the figures that evaluations of this step's checkpoint left in the run directory."""
    scores = {}
    for kind, result in read_results(run_dir, step).items():
        scores |= {f"{kind}: {name}": f"{value:.4f}" for name, value in result.items() if isinstance(value, float)}
        for task, score in result["scores"].items():
            scores[f"{kind}: {task}, accuracy"] = f"{score['accuracy']:.4f} ({score['examples']:,} examples)"
    return scores
