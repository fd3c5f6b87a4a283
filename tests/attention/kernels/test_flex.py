"""FlexAttention forced on a CPU, which has its forward: the window, few compilations, one graph, also under DDP."""

import warnings

import pytest
import torch
from conftest import live_model
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.parallel import DistributedDataParallel

from gkachat.attention.kernels import reference
from gkachat.attention.kernels.choose import Kernel
from gkachat.attention.kernels.flex import FlexAttention, padded_length
from gkachat.attention.qkv import QKV

CPU = torch.device("cpu")


def drawn(B, T):
    generator = torch.Generator().manual_seed(T)
    return QKV(*(torch.randn(B, T, 3, 16, generator=generator) for _ in range(3)), scale=0.3)


def assert_is_the_reference(flex, qkv):
    expected = reference.attend(qkv, window=flex.window, causal=True, include_self=True)
    torch.testing.assert_close(flex.attend(qkv), expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_lengths_are_padded_to_few_sizes():
    sizes = {T: padded_length(T, 2000) for T in range(1, 2001)}
    assert set(sizes.values()) == {128, 256, 512, 1024, 2000}
    assert all(size >= T for T, size in sizes.items())
    assert [padded_length(T, 100) for T in (1, 100, 101)] == [100, 100, 128]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("length", [100, 150, 256, 300])
def test_flex_attention_sees_the_window(length, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    flex = FlexAttention(40, 256, CPU)
    assert flex.compiled is flex_attention
    assert_is_the_reference(flex, drawn(2, length))
    assert set(flex.masks) == {256, padded_length(length, 256)}


def test_twelve_lengths_and_three_batch_sizes_take_two_compilations():
    torch._dynamo.reset()
    flex, before = FlexAttention(40, 256, CPU), counters["stats"]["unique_graphs"]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")  # without a compiled kernel, flex_attention warns and forms all scores
        for T in (1, 2, 41, 100, 127, 128, 129, 160, 200, 201, 255, 256):
            for B in (2, 3, 5):
                assert_is_the_reference(flex, drawn(B, T))
    assert counters["stats"]["unique_graphs"] - before == 2
    assert set(flex.masks) == {128, 256}


def test_training_can_save_a_mask_that_inference_made_first():
    flex = FlexAttention(40, 256, CPU)
    flex.compiled = lambda q, k, v, **options: q
    with torch.inference_mode():
        flex.attend(drawn(1, 100))
    assert not any(t.is_inference() for t in flex.masks[128].as_tuple() if torch.is_tensor(t))


def flex_model():
    """A model whose short layers run FlexAttention, and the logits (2, 256, V) of its usual kernels."""
    model, idx = live_model(sequence_len=256), torch.arange(512).view(2, 256) % 64
    assert [block.attn.window for block in model.blocks] == [129, None]
    with torch.no_grad():
        expected = model(idx)
    model.blocks[0].attn.kernel = Kernel("flex", "a test", FlexAttention(129, 256, CPU).attend)
    return model, idx, expected


def check_one_graph(wrap, **options):
    """Compile the wrapped model, and check its logits and that one graph holds the whole of it."""
    graphs, (model, idx, expected) = [], flex_model()

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():  # a CPU has no backward
        logits = torch.compile(wrap(model), backend=backend, dynamic=False, **options)(idx)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # float32 sums in another order
    [graph] = [targets for targets in graphs if any("embedding" in target for target in targets)]
    assert sum("flex_attention" in target for target in graph) == 1
    assert sum("tanh" in target for target in graph) == 1  # the soft cap of the logits, at the model's end


def test_a_model_with_it_is_one_graph():
    check_one_graph(lambda model: model, fullgraph=True)


def test_a_model_with_it_is_one_graph_under_ddp(tmp_path):
    """Around DDP the compiler splits graphs, whatever the number of processes."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        check_one_graph(DistributedDataParallel)
    finally:
        torch.distributed.destroy_process_group()
