"""Export a checkpoint as a directory that Hugging Face transformers loads without gkachat.

    export(find_run("d4_gka"), Path("out"))
    AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)

The directory holds the weights, the sources of the model (SOURCES, copied from this folder), the tokenizer, the
settings of all three, and a model card.
"""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from gkachat.checkpoint import load_model, remove
from gkachat.files import flush, read_json, write_text
from gkachat.hf.card import model_card
from gkachat.model.gpt import GPT
from gkachat.model.loss import LOGIT_CAP
from gkachat.tokenizer import BOS, Tokenizer

ATTENTIONS = ("softmax", "gka", "gka_conv")  # those that attention_gkachat.py has
SOURCES = ("configuration_gkachat.py", "positions_gkachat.py", "attention_gkachat.py", "modeling_gkachat.py")
END_OF_ANSWER = "<|assistant_end|>"
PAD = "<|output_end|>"  # no text has it; a token that ends texts would be left out of the loss as padding
CHAT_TEMPLATE = (  # renders what gkachat.data.conversations.render does
    "{% if tools %}{{ raise_exception('tools: this model has none; leave them out') }}{% endif %}"
    "{{ bos_token }}{% set ns = namespace(before='', content='', turn=0) %}{% for message in messages %}"
    "{% set given, ns.content = message.content, '' %}"
    "{% for part in (given if given is iterable and given is not string else [given]) %}"
    "{% set text = part if part is string else part.text %}"
    "{% if text is not string or (part is not string and part.type | default('text') != 'text') %}"
    "{{ raise_exception('content: expected a text, or a list of parts of type text') }}{% endif %}"
    "{% set ns.content = ns.content + ('' if loop.first else '\n') + text %}{% endfor %}"
    "{% if message.role in ['system', 'developer'] and loop.first and not loop.last %}"
    "{% set ns.before = ns.content + '\n\n' %}"
    "{% else %}{% if message.role != ['user', 'assistant'][ns.turn % 2] %}"
    "{{ raise_exception('messages: expected turns of user and assistant, one system message before them') }}{% endif %}"
    "{{ '<|' + message.role + '_start|>' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ ns.content + '<|assistant_end|>' }}{% endgeneration %}"
    "{% else %}{{ ns.before + ns.content + '<|user_end|>' }}{% endif %}"
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
    """Write a run's checkpoint to the directory `out`, completely or not at all, and return its config.json.

    Args:
        step: the checkpoint to export; None exports the last.
        dtype: float32 or bfloat16, for embeddings and matrices; bandwidths and scales stay float32.
        max_shard_size: weights above this size, such as "5GB", are split into files with an index.
        overwrite: replace an earlier export.

    Raises:
        FileNotFoundError: the run or the checkpoint does not exist.
        ValueError: the checkpoint is damaged, its attention cannot be exported, or an option is invalid.
        OSError: `out` is in use or cannot be written.
    """
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype: given {dtype!r}, expected float32 or bfloat16")
    out = Path(out).resolve()
    _check_free(out, overwrite)
    model, tokenizer, meta = load_model(run_dir, step=step)
    if model.config.attention not in ATTENTIONS:
        raise ValueError(f"{run_dir}: given {model.config.attention} attention, expected {', '.join(ATTENTIONS)}")
    tensors = {  # modeling_gkachat.py has the same names, below `model` except for the head
        name if name.startswith("lm_head.") else f"model.{name}": (
            tensor.to(getattr(torch, dtype)) if tensor.ndim > 1 else tensor
        )
        for name, tensor in model.state_dict().items()
    }
    settings = _settings(model, tokenizer, meta, dtype)
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in settings.items()}
    texts |= {name: (Path(__file__).parent / name).read_text("utf-8") for name in SOURCES}
    texts |= {"tokenizer.json": _with_bos(tokenizer), "README.md": model_card(Path(run_dir), model.config, meta)}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        save_torch_state_dict(tensors, temporary, max_shard_size=max_shard_size, metadata={"format": "pt"})
        for name, text in texts.items():
            write_text(temporary / name, text)
        for path in temporary.glob("*.safetensors"):  # huggingface_hub lets only their owner read them
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
    return settings["config.json"]


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{out} exists and is not empty; choose another directory, or give --overwrite")
    with suppress(ValueError):
        if read_json(out / "config.json", model_type=str)["model_type"] == "gkachat":
            return
    raise FileExistsError(f"{out} is not an earlier export and is not overwritten; choose another directory")


def _with_bos(tokenizer: Tokenizer) -> str:
    """Return the tokenizer's JSON with a rule that puts BOS before each text, as in training."""
    from tokenizers import Tokenizer as BPE
    from tokenizers.processors import TemplateProcessing

    bpe = BPE.from_str(tokenizer.json_text)
    bpe.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.bos)]
    )
    return bpe.to_str(pretty=True)


def _settings(model: GPT, tokenizer: Tokenizer, meta: dict[str, Any], dtype: str) -> dict[str, dict[str, Any]]:
    """Return the JSON files that transformers reads about the model, generation and the tokenizer."""
    shape, names = model.config, model.state_dict().keys()
    windows = [shape.window(layer) for layer in range(shape.depth)]
    bos, end, is_tuned = tokenizer.bos, tokenizer.special[END_OF_ANSWER], "chat" in meta["config"]
    ids = {"bos_token_id": bos, "eos_token_id": [end, bos] if is_tuned else bos, "pad_token_id": tokenizer.special[PAD]}
    config = {
        "model_type": "gkachat",
        "architectures": ["GkachatForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_gkachat.GkachatConfig",
            "AutoModel": "modeling_gkachat.GkachatModel",
            "AutoModelForCausalLM": "modeling_gkachat.GkachatForCausalLM",
            "AutoModelForSequenceClassification": "modeling_gkachat.GkachatForSequenceClassification",
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
        "attention_x0": shape.uses_attention_x0,
        "smear": shape.smear,
        "backout": shape.backout_layer is not None,
        "value_embedding_layers": [
            layer for layer in range(shape.depth) if f"blocks.{layer}.attn.value_embedding.table.weight" in names
        ],
        "short_conv": shape.short_conv,
        "gka_rope": shape.gka.rope,
        "gka_include_self": shape.gka.include_self,
        "gka_normalize": shape.gka.normalize,
        "final_logit_softcapping": LOGIT_CAP,
        **ids,
    }
    unused = list(range(tokenizer.vocab_size, shape.vocab_size))  # rows of the head that belong to no token
    generation = ids | ({"suppress_tokens": unused} if unused else {})
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.sequence_len,
        "bos_token": BOS,
        "eos_token": END_OF_ANSWER if is_tuned else BOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "additional_special_tokens": list(tokenizer.special),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return {"config.json": config, "generation_config.json": generation, "tokenizer_config.json": tokens}
