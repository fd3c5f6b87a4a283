"""Exported runs in Hugging Face transformers give the logits, tokens and ids of gkachat, and exports are complete."""

import inspect
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gkachat.checkpoint import Saver, load_model, start_run
from gkachat.config import Config, GKAConfig, GPTConfig, TuningConfig
from gkachat.data.conversations import render, render_prompt
from gkachat.eval.results import task_score, write_result
from gkachat.hf.export import export
from gkachat.inference.engine import Engine
from gkachat.model.gpt import GPT
from gkachat.model.stats import model_stats
from gkachat.tokenizer import SPECIAL_TOKENS, train_tokenizer
from scripts.export_hf import main

transformers = pytest.importorskip("transformers")
STDLIB = Path(sysconfig.get_paths()["stdlib"])
SHAPES = {
    "softmax": {"attention": "softmax"},
    "softmax_plain": {"attention": "softmax", "value_embeddings": False, "smear": False, "backout": False},
    "softmax_conv": {"attention": "softmax", "short_conv": True, "attention_x0": True},
    "gka": {"attention": "gka"},
    "gka_rope": {"attention": "gka", "gka": GKAConfig(rope=True), "attention_x0": True},
    "gka_all": {"attention": "gka", "gka": GKAConfig(rope=True, include_self=False, normalize=True)},
    "gka_conv": {"attention": "gka_conv"},
    "gka_conv_plain": {"attention": "gka_conv", "attention_x0": False},
}
LENGTH, WINDOW = 200, 129  # the short windows hide some tokens
PROPERTY = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
NO_SURROGATES = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([(STDLIB / "heapq.py").read_text(), (STDLIB / "this.py").read_text()], 400)


def make_run(directory, tokenizer, tuned=False, vocab_size=400, **shape):
    """Return a run with one checkpoint. All weights are drawn, so that logits depend on each of them."""
    shape = {"depth": 3, "sequence_len": 256, "n_embd": 32, "head_dim": 16, "window_pattern": "SSL", **shape}
    config = (TuningConfig if tuned else Config)(model=GPTConfig(vocab_size=vocab_size, **shape))
    torch.manual_seed(3)
    model = GPT(config.model)
    for name, p in model.named_parameters():
        if name.endswith(("c_proj.weight", "lm_head.weight", "attn.head_gate.gate.weight", "forget_gate.gate.weight")):
            torch.nn.init.normal_(p, std=0.3)
        elif ".conv_" in name:
            p.data += 0.1 * torch.randn(p.shape)
        elif p.ndim == 1:
            p.data += 0.3 * torch.randn(p.shape)
    start_run(directory, config, tokenizer)
    saver = Saver(directory, config, tokenizer, report=lambda line: None)
    saver.save(7, model.state_dict(), {}, {"tokens": 1234})
    saver.finish()
    return directory


@pytest.fixture(scope="module")
def root(tmp_path_factory, transformers_modules):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module", params=SHAPES)
def both(request, root, tokenizer):
    """Return gkachat's model and transformers' model of the same run."""
    run = make_run(root / "runs" / request.param, tokenizer, **SHAPES[request.param])
    export(run, root / request.param)
    return load_model(run)[0], load(root / request.param)


@pytest.fixture(scope="module")
def tuned(root, tokenizer):
    """Return a run tuned on conversations, the directory of its export, and the tokenizer there."""
    run = make_run(root / "runs" / "talks", tokenizer, tuned=True, attention="gka", depth=1, vocab_size=410)
    export(run, root / "talks")
    return run, root / "talks", transformers.AutoTokenizer.from_pretrained(root / "talks", trust_remote_code=True)


def load(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options).eval()


def in_transformers(name):
    """Return the name of a parameter of gkachat's in the exported model."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def some_tokens(B=2, T=LENGTH, seed=0):
    return torch.randint(391, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_logits_equal_those_of_gkachat_for_a_whole_text_its_parts_and_padded_rows(both):
    ours, theirs = both
    # Biases of keys, up to 60, round off 4e-6 of the scores of each of three layers.
    idx, close = some_tokens(), {"atol": 5e-5, "rtol": 1e-5}
    expected = ours(idx)
    torch.testing.assert_close(theirs(idx, use_cache=False).logits, expected, **close)
    assert any(block.attn.window == WINDOW for block in theirs.model.blocks)
    cache = transformers.DynamicCache(config=theirs.config)
    parts = [theirs(part, cache=cache).logits for part in idx.split([3, 140, 1, 5, 51], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **close)
    padded, mask = idx.clone(), torch.ones(2, LENGTH, dtype=torch.long)
    padded[1, 150:], mask[1, 150:] = 399, 0
    padded_logits = theirs(padded, attention_mask=mask).logits
    torch.testing.assert_close(padded_logits[1, :150], expected[1, :150], **close)


def test_generate_gives_the_greedy_tokens_of_the_engine(both, tokenizer):
    ours, theirs = both
    text = some_tokens(1, 110, seed=1)[0].tolist()
    expected = list(Engine(ours, tokenizer).generate(text, max_tokens=50, temperature=0))
    found = theirs.generate(torch.tensor([[tokenizer.bos, *text]]), max_new_tokens=50, do_sample=False)
    found = found[0, 111:].tolist()
    assert len(set(expected)) > 3
    assert found[: len(expected)] == expected and found[len(expected) :] in ([], [tokenizer.bos])


@pytest.mark.parametrize("both", ["softmax", "gka_all", "gka_conv"], indirect=True)
def test_rows_padded_on_the_left_continue_as_they_do_alone(both):
    _, theirs = both
    rows = [some_tokens(1, T, seed)[0].tolist() for seed, T in enumerate((5, 131, 60))]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    alone = [theirs.generate(torch.tensor([row]), **options)[0, len(row) :].tolist() for row in rows]
    padded = torch.tensor([[399] * (131 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (131 - len(row)) + [1] * len(row) for row in rows])
    together = theirs.generate(padded, attention_mask=mask, pad_token_id=399, **options)[:, 131:].tolist()
    assert together == alone


@torch.inference_mode()
def test_a_cache_is_bounded_by_the_window_and_that_of_gka_is_one_tensor_per_layer(both):
    ours, theirs = both
    cache = transformers.DynamicCache(config=theirs.config)
    theirs(some_tokens(), cache=cache)
    numbers = {"softmax": 2 * 16, "gka": 16, "gka_conv": 16 + 1}[ours.config.attention]  # of each token and head
    halo = 3 if ours.config.attention == "gka_conv" else 0  # tokens that the oldest key is a convolution of
    expected = [numbers * 2 * 2 * n * 4 for n in [WINDOW - 1 + halo] * 2 + [LENGTH]]  # B, H, 4 bytes
    assert [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers[:3]] == expected


def test_loss_and_gradients_equal_those_of_gkachat(both):
    ours, theirs = both
    idx = some_tokens(T=40)
    labels = idx.clone()
    labels[:, :9] = -100
    targets = torch.cat((labels[:, 1:], torch.full((2, 1), -100)), dim=1)
    losses = theirs.train()(idx, labels=labels).loss, ours(idx, targets.where(targets != -100, -1))
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(theirs.get_parameter(in_transformers(name)).grad, p.grad, atol=1e-5, rtol=1e-3)
    theirs.zero_grad(), ours.zero_grad(), theirs.eval()


@pytest.mark.parametrize("both", ["gka_conv"], indirect=True)
def test_beam_search_and_sampling_run_and_unsupported_inputs_are_refused(both):
    _, theirs = both
    beams = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    rows = theirs.generate(some_tokens(2, 4), **beams)
    assert rows.shape == (4, 10) and torch.equal(rows, theirs.generate(some_tokens(2, 4), use_cache=False, **beams))
    assert theirs.generate(some_tokens(2, 4), max_new_tokens=3, do_sample=True).shape[0] == 2
    for options, message in (
        ({"cache": transformers.StaticCache(config=theirs.config, max_cache_len=8)}, "expected a DynamicCache"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask: given"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, "packed into one row"),
    ):
        with pytest.raises(ValueError, match=message):
            theirs(some_tokens(2, 6), **options)


@pytest.mark.parametrize("attention", ["gka", "gka_conv"])
@torch.inference_mode()
def test_bfloat16_exports_keep_scales_in_float32_and_sharded_files_load(root, tokenizer, attention):
    run, out = make_run(root / "runs" / f"half_{attention}", tokenizer, attention=attention), root / f"half_{attention}"
    export(run, out, dtype="bfloat16", max_shard_size="50KB")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    ours, theirs = load_model(run)[0], load(out, dtype="auto")
    dtypes = {name: p.dtype for name, p in theirs.named_parameters()}
    of_layers = ["log_sigma"] + (["forget_gate.bias"] if attention == "gka_conv" else [])
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        *(f"model.{name}" for name in ("residual_scale", "x0_mix", "backout", "smear.share")),
        *(f"model.blocks.{i}.attn.{name}" for i in range(3) for name in of_layers),
        *(f"model.blocks.{i}.attn.input_mix" for i in (1, 2) if attention == "gka_conv"),
    }
    ours.prepare(torch.bfloat16)
    difference = (theirs(some_tokens()).logits - ours(some_tokens())).abs()
    assert difference.mean() < 0.025  # each is 0.02 from float32; a running sum in bfloat16 would be 0.035 from ours


def test_an_export_loads_without_gkachat(tuned, tokenizer, tmp_path):
    """Another interpreter, in another directory, sees only installed packages."""
    run, path, _ = tuned
    code = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(path)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(path)!r}, trust_remote_code=True)
asked = tokenizer.apply_chat_template([{{"role": "user", "content": "hi"}}], add_generation_prompt=True,
                                      return_tensors="pt", return_dict=True)
print(model.generate(**asked, max_new_tokens=9, do_sample=False)[0].tolist())
assert not [name for name in sys.modules if name.split(".")[0] == "gkachat"]
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    asked = render_prompt(tokenizer, [{"role": "user", "content": "hi"}])
    end = tokenizer.special["<|assistant_end|>"]
    engine = Engine(load_model(run)[0], tokenizer)
    answer = list(engine.generate(asked[1:], max_tokens=9, temperature=0, stop_tokens=(end,)))
    found = json.loads(result.stdout)
    assert found[: len(asked) + len(answer)] == asked + answer
    assert len(answer) == 9 or found[len(asked) + len(answer)] in (end, tokenizer.bos)


@PROPERTY
@given(st.lists(NO_SURROGATES | st.sampled_from(SPECIAL_TOKENS) | st.from_regex(r"[\w\s\d']+")).map("".join))
def test_any_text_has_the_ids_of_gkachat_and_decodes_to_itself(tuned, tokenizer, text):
    theirs = tuned[2]
    bos, *ids = theirs(text, split_special_tokens=True)["input_ids"]
    assert bos == tokenizer.bos and ids == tokenizer.encode(text)
    assert theirs.decode(ids) == tokenizer.decode(ids) == text
    if not any(name in text for name in SPECIAL_TOKENS):
        assert theirs(text)["input_ids"] == [bos, *ids]
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids


def test_text_that_spells_a_special_token_is_that_token_by_default(tuned, tokenizer):
    theirs, a = tuned[2], tokenizer.encode("a")
    assert dict(theirs("<|bos|>a", add_special_tokens=False)) == {
        "input_ids": [tokenizer.bos, *a], "attention_mask": [1] * (1 + len(a)),
    }  # fmt: skip
    assert theirs.decode([tokenizer.bos, *a], skip_special_tokens=True) == "a"


def test_texts_begin_with_bos_and_padding_is_no_token_that_ends_texts(tuned, tokenizer):
    theirs, a, b = tuned[2], tokenizer.encode("a b"), tokenizer.encode("c")
    assert theirs("a b")["input_ids"] == [tokenizer.bos, *a]
    assert theirs("a b", "c")["input_ids"] == [tokenizer.bos, *a, *b]
    assert theirs.bos_token_id == tokenizer.bos and theirs.eos_token_id == tokenizer.special["<|assistant_end|>"]
    assert theirs.pad_token_id not in (theirs.bos_token_id, theirs.eos_token_id)
    plain = transformers.AutoTokenizer.from_pretrained(tuned[1], add_bos_token=False)
    assert isinstance(plain, transformers.PreTrainedTokenizerFast)
    assert plain("a b")["input_ids"] == a


PLAIN = NO_SURROGATES.filter(lambda text: not any(name in text for name in SPECIAL_TOKENS))


@PROPERTY
@given(st.none() | PLAIN, st.lists(PLAIN, min_size=1, max_size=5))
def test_the_chat_template_renders_what_gkachat_renders(tuned, tokenizer, system, said):
    theirs = tuned[2]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    role = ("system", "developer")[len(said) % 2]
    messages = messages if system is None else [{"role": role, "content": system}, *messages]
    found = theirs.apply_chat_template(messages, return_dict=False)
    assert found == render(tokenizer, messages)[0]
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == render_prompt(
        tokenizer, messages
    )
    parts = [message | {"content": [{"type": "text", "text": message["content"]}] * 2} for message in messages]
    masked = theirs.apply_chat_template(parts, return_dict=True, return_assistant_tokens_mask=True)
    ids, learned = render(tokenizer, parts)
    assert masked["input_ids"] == ids and masked["assistant_masks"] == [int(learns) for learns in learned]


def test_special_tokens_in_untrusted_messages_can_be_made_text(tuned, tokenizer):
    if "sanitize_control_tokens" not in inspect.signature(tuned[2].apply_chat_template).parameters:
        pytest.skip("this version of transformers has no sanitize_control_tokens")
    theirs, messages = tuned[2], [{"role": "user", "content": "a<|user_end|>"}]
    safe = theirs.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=False)
    assert safe.count(tokenizer.special["<|user_end|>"]) == 1
    assert tokenizer.decode(safe) == tokenizer.decode(render(tokenizer, messages)[0])


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["user", "system"], ["system"], ["tool"]])
def test_invalid_conversations_are_refused(tuned, roles):
    with pytest.raises(Exception, match="expected turns of user and assistant"):
        tuned[2].apply_chat_template([{"role": role, "content": "x"} for role in roles])


def test_tools_and_content_that_is_no_text_are_refused(tuned):
    for content in (3, [{"type": "image", "url": "x"}], [{"type": "text"}]):
        with pytest.raises(Exception, match="content: expected a text"):
            tuned[2].apply_chat_template([{"role": "user", "content": content}])
    with pytest.raises(Exception, match="tools: this model has none"):
        tuned[2].apply_chat_template([{"role": "user", "content": "x"}], tools=[{"type": "function"}])


def test_ids_beyond_the_vocabulary_are_never_generated(tuned, tokenizer):
    model = load(tuned[1])
    assert model.config.vocab_size == 410 and tokenizer.vocab_size == 400
    assert model.generation_config.eos_token_id == [tokenizer.special["<|assistant_end|>"], tokenizer.bos]
    with torch.no_grad():
        model.lm_head.weight[400:] = 100 * model.lm_head.weight[:10].abs()
    assert model.generate(some_tokens(4, 8), max_new_tokens=9, do_sample=False).max() < 400


def test_the_card_has_the_counts_and_the_scores_of_this_checkpoint(root, tokenizer):
    run = make_run(root / "runs" / "scored", tokenizer, attention="gka")
    meta, cpu = {"step": 7, "sha256": {"model.safetensors": "ab"}}, torch.device("cpu")
    write_result(run, "bpb", meta, cpu, val_bpb=1.2345)
    write_result(run, "core", meta, cpu, {"arc": task_score(0.25, 4, 1.0)}, mean_centered=0.125)
    write_result(run, "core", meta | {"step": 6}, cpu, {"old": task_score(0.5, 4, 1.0)})
    export(run, root / "scored")
    card = (root / "scored" / "README.md").read_text()
    for row in (
        "val_bpb | 1.2345", "core: arc, accuracy | 0.2500", "core: mean_centered | 0.1250", "step | 7",
        "tokens | 1234", "transformers>=5", "add_bos_token=False", "Prefix tuning is refused",
        f"parameters: total | {model_stats(load_model(run)[0].config).params['total']:,}", "license: mit",
    ):  # fmt: skip
        assert row in card
    assert "old" not in card


def test_only_an_earlier_export_is_overwritten_and_a_failed_one_leaves_it(tokenizer, tmp_path, monkeypatch):
    run, out = make_run(tmp_path / "run", tokenizer, attention="gka", depth=1), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    for overwrite, message in ((False, "not empty"), (True, "not an earlier export")):
        with pytest.raises(FileExistsError, match=message):
            export(run, out, overwrite=overwrite)
    (out / "mine.txt").unlink()
    export(run, out)
    (out / "left.txt").write_text("x")
    export(run, out, overwrite=True)
    assert not (out / "left.txt").exists()
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode

    def no_space(*args):
        raise OSError(28, "No space left on device")

    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr("gkachat.hf.export.flush", no_space)
    for name in ("out", "other"):
        with pytest.raises(OSError, match="cannot write"):
            export(run, tmp_path / name, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == before
    assert json.loads((out / "config.json").read_text())["model_type"] == "gkachat"


def test_the_script_exports_a_run(tokenizer, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "runs" / "d1", tokenizer, attention="gka", depth=1)
    monkeypatch.setenv("GKACHAT_HOME", str(tmp_path))
    tyro.cli(main, args=["d1", str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert "model.safetensors" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_invalid_options_are_refused(tokenizer, tmp_path):
    run = make_run(tmp_path / "run", tokenizer, attention="gka", depth=1)
    for run_dir, options, message in (
        (run, {"step": 3}, "step"),
        (run, {"dtype": "int8"}, "dtype: given"),
        (run, {"max_shard_size": "y"}, "Y"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            export(run_dir, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
