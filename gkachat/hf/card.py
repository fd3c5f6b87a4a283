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
gka_conv is that kernel on short convolutions of its input, with forget gates (FoX, arXiv 2503.02130) and gates on
each head's output.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "..."  # this directory; its .py files are the model
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
{usage}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

It needs `transformers>=5`. `AutoModel` and `AutoModelForSequenceClassification` load the same weights without the head.

- **Beginning.** Every text begins with `<|bos|>`. The tokenizer puts it there, and so does the chat template; without
  it a token costs 0.1 to 0.4 nats more. `add_special_tokens=False` leaves it out: give it for a text that the template
  has rendered, which would begin with two. Rolling tasks of lm-eval, such as
  wikitext, put it there themselves: give `--model_args pretrained=...,trust_remote_code=True,add_bos_token=False`
  for those, and only for those. Otherwise the harness scores one `<|bos|>` more in each text.
- **End.** `{eos}` ends {ended}. Padding is another token, so that tuning also learns to end.
- **Special tokens.** Text that spells a special token is read as that token. For untrusted text, give
  `split_special_tokens=True` to the tokenizer, or `sanitize_control_tokens=True` to its chat template, which
  transformers 5.24 has and 5.0 silently ignores.
- **Chat template.** Turns of user and assistant, after at most one system message; content is a text or a list of
  parts of type text. Tools are refused.
- **Padding** may be anywhere in a row, also between turns: positions follow from the attention mask. Windows of
  cached layers count it, as transformers' caches do. Texts packed into one row and static caches are refused.
- **New tokens.** After `tokenizer.add_tokens(...)`, call `model.resize_token_embeddings(len(tokenizer))`.
- **Tuning.** The logits are soft-capped: `final_logit_softcapping` in the config. LoRA and its relatives find their
  matrices themselves. Prefix tuning {prefix_tuning}; prompt tuning and `inputs_embeds` {prompt_tuning}. Tools that load
  the model once more by its path, such as TRL's DPO, want `trust_remote_code=True` in their config.

| | |
| --- | --- |
{rows}

Code and weights are under the MIT License. The training data has terms of its own.
"""

BASE_USAGE = 'inputs = tokenizer("def add(", return_tensors="pt")'
CHAT_USAGE = """messages = [{"role": "user", "content": "What is 2 + 2?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""


def model_card(run_dir: Path, shape: GPTConfig, meta: dict[str, Any]) -> str:
    """Return the card: what the model is, how it was trained, how it scores and how to load it."""
    stored, stats = meta["config"], model_stats(shape)
    data, train, chat = stored["data"], stored["train"], stored.get("chat")
    options = [name for name in ("rope", "normalize") if getattr(shape.gka, name)]
    options += [] if shape.gka.include_self else ["without self"]
    reads = ["reads the embedding too"] if shape.uses_attention_x0 else []
    source = data["dataset"] if data["source"] == "huggingface" else data["source"]
    facts = {
        "attention": ", ".join([shape.attention, *(options if shape.attention == "gka" else []), *reads]),
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
    needs_ids = shape.uses_value_embeddings
    return CARD.format(
        name=run_dir.resolve().name,
        attention=shape.attention,
        usage=CHAT_USAGE if chat else BASE_USAGE,
        eos="<|assistant_end|>" if chat else "<|bos|>",
        ended="an answer" if chat else "a text",
        prefix_tuning="works" if shape.attention == "softmax" else "is refused, since the cache keeps no values",
        prompt_tuning="are refused, since value embeddings need token ids" if needs_ids else "work",
        rows="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
    )


def _scores(run_dir: Path, step: int) -> dict[str, str]:
    """Return the figures that evaluations of this step's checkpoint left in the run directory."""
    scores = {}
    for kind, result in read_results(run_dir, step).items():
        scores |= {f"{kind}: {name}": f"{value:.4f}" for name, value in result.items() if isinstance(value, float)}
        for task, score in result["scores"].items():
            scores[f"{kind}: {task}, accuracy"] = f"{score['accuracy']:.4f} ({score['examples']:,} examples)"
    return scores
