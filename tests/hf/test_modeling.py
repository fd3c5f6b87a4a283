"""The exported model's own behaviour in transformers: padding, caches, windows, devices, refusals. No run is exported.

test_export.py compares it with gkachat; here one way to call it is compared with another.
"""

import copy
import itertools
from importlib import metadata, reload

import pytest
import torch

transformers = pytest.importorskip("transformers")

from gkachat.hf import configuration_gkachat  # noqa: E402
from gkachat.hf.configuration_gkachat import GkachatConfig  # noqa: E402
from gkachat.hf.modeling_gkachat import GkachatForCausalLM, GkachatForSequenceClassification  # noqa: E402
from gkachat.hf.positions_gkachat import BLOCK, Positions  # noqa: E402

V, C, WINDOW = 64, 32, 9
SHAPES = {
    "softmax": {"attention": "softmax", "value_embedding_layers": [0, 2]},
    "softmax_conv": {"attention": "softmax", "short_conv": True},
    "gka": {"attention": "gka"},
    "gka_rope": {"attention": "gka", "gka_rope": True, "gka_include_self": False},
    "gka_conv": {"attention": "gka_conv", "attention_x0": True},
}


def make_model(name, **options):
    """Return a tiny model whose logits depend on every weight."""
    torch.manual_seed(5)
    config = GkachatConfig(
        vocab_size=V, hidden_size=C, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=64,
        window=WINDOW, layer_types=["sliding_attention", "sliding_attention", "full_attention"], initializer_range=0.3,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, **(SHAPES[name] | options),
    )  # fmt: skip
    model = GkachatForCausalLM(config).eval()
    for _, p in sorted(model.named_parameters()):
        if p.ndim != 2:
            p.data += 0.2 * torch.randn(p.shape)
    return model


@pytest.fixture(params=SHAPES)
def model(request):
    return make_model(request.param)


def tokens(B=1, T=24, seed=0):
    return torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)  # float32, other orders of summation


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.inference_mode()
def test_padding_changes_no_logit_wherever_it_is(model, implementation):
    """A row that ended early and goes on after the others has padding inside."""
    model.set_attn_implementation(implementation)
    idx, mask = tokens(), torch.ones(3, 30, dtype=torch.long)
    expected = model(idx).logits
    padded = torch.zeros(3, 30, dtype=torch.long)
    for row, holes in enumerate((range(6), range(8, 14), (0, 5, 6, 12, 25, 29))):
        mask[row, list(holes)] = 0
        padded[row, mask[row].bool()] = idx[0]
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    for options in ({}, {"position_ids": position_ids}):
        logits = model(padded, attention_mask=mask, **options).logits
        assert not logits.isnan().any()
        for row in range(3):
            assert_close(logits[row, mask[row].bool()], expected[0])
    with pytest.raises(ValueError, match="position_ids: expected consecutive"):
        model(padded, attention_mask=mask, position_ids=torch.arange(30)[None])


@torch.inference_mode()
def test_what_a_row_gives_at_padding_too_does_not_depend_on_holes_in_other_rows(model):
    idx, mask = tokens(2, 7), torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 1]])
    together = model(idx, attention_mask=mask).logits
    for row in range(2):
        alone = model(idx[row : row + 1], attention_mask=mask[row : row + 1]).logits
        assert_close(together[row], alone[0])


@torch.inference_mode()
def test_a_conversation_goes_on_in_the_cache_after_rows_of_different_lengths(model):
    """The hole is shorter than what a windowed layer's cache, which counts padding, has to spare."""
    first, second = tokens(2, 5), tokens(2, 3, seed=1)
    cache = transformers.DynamicCache(config=model.config)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    model(first, attention_mask=mask, cache=cache)
    parts = []
    for token in second.split(1, dim=1):
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
        parts.append(model(token, attention_mask=mask, cache=cache).logits)
    found = torch.cat(parts, dim=1)
    assert_close(found[0], model(torch.cat((first[:1], second[:1]), dim=1)).logits[0, 5:])
    assert_close(found[1], model(torch.cat((first[1:, :3], second[1:]), dim=1)).logits[0, 3:])


@torch.inference_mode()
def test_a_window_in_the_cache_counts_padding_between_turns(model):
    """A hole of 2 leaves the keys that a window shorter by 2 would see. No key lacks tokens of its convolution."""
    shape = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "value_embedding_layers": []}
    model = GkachatForCausalLM(GkachatConfig(**(model.config.to_dict() | shape))).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    idx, cache, mask = tokens(), transformers.DynamicCache(config=model.config), torch.ones(1, 26, dtype=torch.long)
    mask[:, 20:22] = 0
    model(torch.cat((idx[:, :20], idx[:, :2]), dim=1), attention_mask=mask[:, :22], cache=cache)
    found = model(idx[:, 20:21], attention_mask=mask[:, :23], cache=cache).logits[:, 0]
    model.model.blocks[0].attn.window = WINDOW - 2
    assert_close(found, model(idx).logits[:, 20])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_gka_conv_cache_holds_half_of_what_softmax_keeps(dtype):
    idx, n_bytes = tokens(2, 40), {}
    for attention in ("softmax", "gka_conv"):
        shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
        config = GkachatConfig(attention, V, smear=False, **shape)
        model = GkachatForCausalLM(config).to(dtype).eval()
        cache = transformers.DynamicCache(config=config)
        parts = [model(part, cache=cache).logits for part in idx.split([20, 1, 6, 13], dim=1)]
        difference = (torch.cat(parts, dim=1) - model(idx).logits).abs().mean()
        assert difference < {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]  # of logits up to 15
        layers = [layer for layer in cache.layers if layer.is_initialized]
        n_bytes[attention] = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    n = dtype.itemsize  # the bias of a key has 4 bytes
    assert n_bytes["gka_conv"] / n_bytes["softmax"] == (64 * n + 4) / (128 * n)


@torch.inference_mode()
def test_biases_that_gka_conv_caches_do_not_depend_on_how_a_text_is_read():
    """In bfloat16 too, what is taken out of the last bias is to the last bit what was put into it."""
    model = make_model("gka_conv").bfloat16()
    attn = model.model.blocks[0].attn
    for conv in (attn.conv_q, attn.conv_k):
        conv.weight += 1  # |k|^2 / (2 sigma^2) is about 50
    idx, biases = tokens(2, 300), []
    for sizes in ([300], [1, 2, 1, 3, 9, 1, 4, 9] * 10, [1] * 300):
        cache = transformers.DynamicCache(config=model.config)
        for part in idx.split(sizes, dim=1):
            model(part, cache=cache)
        biases.append(cache.layers[0].values.view(torch.float32))  # of the last keys, in a layer with a window
    assert biases[0].abs().max() > 40
    for bias in biases[1:]:
        assert (bias - biases[0]).abs().max() < 0.02


@torch.inference_mode()
def test_a_gka_conv_cache_holds_sums_beyond_the_range_of_float16():
    model, idx = make_model("gka_conv").bfloat16(), tokens()
    for block in model.model.blocks:
        block.attn.forget_gate.bias.fill_(-5000.0)  # each token forgets all before it: sums grow to 120,000
    cache = transformers.DynamicCache(config=model.config)
    parts = [model(part, cache=cache).logits for part in idx.split([20, 1, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(idx).logits, atol=0.1, rtol=0.05)


@torch.inference_mode()
def test_a_cache_that_is_taken_back_to_its_beginning_starts_anew(model):
    idx, cache = tokens(), transformers.DynamicCache(config=model.config)
    model(idx[:, :5], cache=cache)
    cache.crop(-5)
    parts = [model(part, cache=cache).logits for part in idx.split([1, 23], dim=1)]
    assert_close(torch.cat(parts, dim=1), model(idx).logits)


@torch.inference_mode()
def test_windows_attend_in_blocks_as_they_do_at_once(model):
    """Asking for the weights computes all scores at once, by the definition."""
    idx = tokens(2, 2 * BLOCK + 7)
    expected = model(idx, output_attentions=True)
    assert (expected.attentions[0].flatten(0, 1) > 0).sum(dim=-1).max() <= WINDOW
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert_close(model(idx).logits, expected.logits)
    sizes = [q.stop - q.start for q, *_ in Positions(
        idx.shape, 0, None, None, model.config, idx.device
    ).spans(idx.size(1), WINDOW, True, True)]  # fmt: skip
    assert sizes == [BLOCK, BLOCK, 7]


def test_gradients_of_sdpa_and_of_checkpointing_are_those_of_eager_attention(model):
    idx, gradients = tokens(2, 20), []
    for implementation, checkpointing in (("eager", False), ("sdpa", False), ("sdpa", True)):
        trained = copy.deepcopy(model).train()
        trained.set_attn_implementation(implementation)
        if checkpointing:
            trained.gradient_checkpointing_enable()
        trained(idx, labels=idx).loss.backward()
        gradients.append([p.grad for p in trained.parameters()])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@torch.inference_mode()
def test_decoding_does_the_same_work_at_each_step_and_takes_tokens_back(model):
    """Prompt lookup drafts tokens and takes the rejected ones out of the cache again."""
    idx = tokens(1, 6).repeat(1, 3)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "suppress_tokens": [0]}  # no padding
    expected = model.generate(idx, **options)
    assert model.generate(idx, prompt_lookup_num_tokens=4, **options).equal(expected)
    assert model.generate(idx, tokenizer=object(), **options).equal(expected)  # stop_strings need it; it is passed on
    assert model.generate(idx, assistant_model=make_model("gka"), **options).equal(expected)
    cache = transformers.DynamicCache(config=model.config)
    model(idx, cache=cache)
    with pytest.raises(ValueError, match="take back 61 tokens"):
        cache.layers[-1].is_initialized = True
        cache.layers[-1].crop(-61)


@torch.inference_mode()
def test_hidden_states_and_the_base_model_are_given(model):
    idx = tokens()
    output = model(idx, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(1, 24, C)] * 4
    assert [tuple(weights.shape) for weights in output.attentions] == [(1, 2, 24, 24)] * 3
    hidden = model.model(idx).last_hidden_state
    assert_close(output.hidden_states[-1], hidden)
    cap = model.config.final_logit_softcapping
    assert_close(cap * (model.lm_head(hidden) / cap).tanh(), output.logits)


def test_a_classifier_learns(model):
    config = copy.deepcopy(model.config)
    config.num_labels = 2
    classifier = GkachatForSequenceClassification(config).train()
    idx, labels = tokens(4, 12), torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.Adam(classifier.parameters(), 0.01)
    losses = []
    for _ in range(8):
        loss = classifier(idx, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@torch.inference_mode()
def test_new_tokens_have_rows_in_every_table_and_the_saved_model_loads(model, tmp_path):
    model.generation_config.suppress_tokens = [V - 1]
    expected = model(tokens()).logits
    model.resize_token_embeddings(V + 3)
    assert model.generation_config.suppress_tokens is None  # rows without a token are tokens now
    assert_close(model(tokens()).logits[..., :V], expected)
    model(torch.full((1, 3), V + 2))
    model.save_pretrained(tmp_path)
    assert_close(GkachatForCausalLM.from_pretrained(tmp_path)(tokens()).logits[..., :V], expected)


@torch.inference_mode()
def test_embeddings_are_taken_where_no_layer_needs_ids(model):
    idx, embeds = tokens(), model.get_input_embeddings()(tokens())
    if model.config.value_embedding_layers:
        with pytest.raises(ValueError, match="value embeddings need token ids"):
            model(inputs_embeds=embeds)
        return
    assert_close(model(inputs_embeds=embeds).logits, model(idx).logits)
    found = model.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert found.equal(model.generate(idx, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, 24:])


def test_what_the_model_does_not_have_is_refused():
    model, idx = make_model("gka"), tokens(2, 6)
    for options, message in (
        ({"cache": transformers.StaticCache(config=model.config, max_cache_len=8)}, "expected a DynamicCache"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask: given"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, "packed into one row"),
        ({"position_ids": torch.arange(5)[None]}, "position_ids: given"),
        ({"token_type_ids": idx}, "given token_type_ids, which this model does not have"),
        ({"inputs_embeds": torch.zeros(2, 6, C)}, "either input_ids or inputs_embeds"),
    ):
        for part in (model, model.model):
            with pytest.raises(ValueError, match=message):
                part(idx, **options)
    for part, wrong in itertools.product((model, model.model), (idx[0], idx[:, :0])):
        with pytest.raises(ValueError, match="input_ids: given shape"):
            part(wrong)
    with pytest.raises((ValueError, ImportError)):
        make_model("gka", attn_implementation="flash_attention_2")
    for options, message in (
        ({"attention": "linear"}, "attention: given 'linear'"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size: given 30"),
        ({"attention": "gka_conv", "value_embedding_layers": [0]}, "value_embedding_layers: given"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping: given None"),
    ):
        with pytest.raises(ValueError, match=message):
            GkachatConfig(**options)


def test_an_older_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "4.57.0")
    with pytest.raises(ImportError, match="needs transformers 5 or newer"):
        reload(configuration_gkachat)


@torch.no_grad()
def test_a_model_split_over_two_devices_moves_what_blocks_share(model):
    """torch refuses to mix tensors of a CPU and of the meta device, so that no GPU is needed."""
    hooks = pytest.importorskip("accelerate").hooks
    for name, module in model.named_modules():
        if name in ("model.blocks.1", "model.blocks.2", "lm_head"):
            hooks.add_hook_to_module(module.to("meta"), hooks.AlignDevicesHook("meta"))
    cache = transformers.DynamicCache(config=model.config)
    mask = torch.tensor([[0, 0] + [1] * 10, [1] * 12])
    for idx, seen in ((tokens(2, 12), mask), (tokens(2, 1), torch.nn.functional.pad(mask, (0, 1), value=1))):
        output = model(idx, attention_mask=seen, cache=cache)
    assert output.logits.device.type == "meta"
    assert [layer.keys.device.type for layer in cache.layers[:3]] == ["cpu", "meta", "meta"]
    assert set(model._no_split_modules) == {"Block"}
