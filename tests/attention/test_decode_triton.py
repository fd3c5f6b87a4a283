"""The fused decoding kernel in Triton's interpreter against float64, and whole models that decode with it."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from gkachat.attention import cache
from gkachat.attention.backends import Backend
from gkachat.attention.cache import Keys
from gkachat.attention.features import rope_at, rotate
from gkachat.attention.kernels.decode_triton import attend, shape, split_kernel
from gkachat.model.gpt import GPT, GKAConfig, GPTConfig

# Relative to the norm of what is exact. The kernel rounds its result alone: half a unit in the last place of 24, 11, 8
# bits, and for float32 sums over K and D.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "float16", "bfloat16"])
VARIANTS = {
    "softmax": {"attention": "softmax"},
    "gka": {"attention": "gka"},
    "gka rope": {"attention": "gka", "gka": GKAConfig(rope=True)},
    "gka without self": {"attention": "gka", "gka": GKAConfig(include_self=False, rope=True)},
}


def exact(q, seen, scale):
    """Softmax over all spans' keys in one, in float64; keys that are not seen are left out of the sum."""
    B, _, H, D = q.shape
    q = q.double().transpose(1, 2)
    scores, values = [], []
    for span in seen:
        k = span.keys.double()
        if span.rope is not None:
            k = rotate(k, *(table.double() for table in span.rope))
        s = q @ k.mT
        if span.norms is not None:
            s = s - 0.5 * span.norms.double().mT
        s = s * (scale.double()[:, None, None] if torch.is_tensor(scale) else scale)
        scores.append(s + span.mask.double())
        values.append(span.values.double().expand(B, -1, -1, -1))
    weights = torch.cat(scores, -1).softmax(-1).nan_to_num(0.0)  # nan where a row sees nothing
    return (weights @ torch.cat(values, 2)).transpose(1, 2).reshape(B, 1, H, D)


def span(dtype, B, H, K, D, lengths, *, one, rope=False, shared=False, seed=0):
    """`one`: keys are values, with norms. Row b sees its first lengths[b] keys, in an order as of a ring buffer."""
    generator = torch.Generator().manual_seed(seed)
    rows = 1 if shared else B
    buffer = torch.randn(rows + 1, H, K + 5, D, generator=generator).to(dtype)  # a view of it is what is seen
    keys = buffer[1:, :, :K]
    values = keys if one else torch.randn(rows, H, K, D, generator=generator).to(dtype)
    order = torch.randperm(K, generator=generator)
    mask = torch.zeros(B, 1, 1, K).masked_fill_(order >= torch.tensor(lengths)[:, None, None, None], -torch.inf)
    norms = keys.float().square().sum(-1, keepdim=True) if one else None
    return Keys(keys, values, mask, norms, rope_at(order.expand(rows, 1, -1), D) if rope else None)


def query(dtype, B, H, D, seed=1):
    return torch.randn(B, 1, H, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(q, seen, scale, **options):
    got, expected = attend(q, seen, scale, **options), exact(q, seen, scale)
    assert got.shape == q.shape and got.dtype == q.dtype
    assert (got.double() - expected).norm() <= TOLERANCE[q.dtype] * expected.norm() + 1e-12
    return got


@DTYPES
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("D", [16, 24, 64, 128])
def test_gka_is_that_of_the_definition(dtype, rope, D):
    seen = [span(dtype, 2, 2, 70, D, (70, 9), one=True, rope=rope)]
    check(query(dtype, 2, 2, D), seen, torch.tensor([1.0, 4.0]) / D)


@DTYPES
@pytest.mark.parametrize("D", [16, 24, 64, 128])
def test_softmax_has_keys_and_values_apart_and_one_scale(dtype, D):
    check(query(dtype, 2, 2, D), [span(dtype, 2, 2, 70, D, (9, 70), one=False)], D**-0.5)


@DTYPES
@pytest.mark.parametrize("one", [True, False])
def test_it_agrees_with_the_plain_form(dtype, one):
    q, scale = query(dtype, 3, 2, 16), torch.tensor([0.1, 0.2])
    seen = [
        span(dtype, 3, 2, 40, 16, (40, 40, 12), one=one, shared=True),
        span(dtype, 3, 2, 21, 16, (1, 21, 5), one=one, seed=3),
    ]
    got, plain = check(q, seen, scale), cache.attend(q, seen, scale)  # the latter rounds weights and partial sums too
    assert (got.double() - plain.double()).norm() <= 4 * TOLERANCE[dtype] * plain.double().norm()


def test_a_row_that_sees_nothing_gives_zeros_and_disturbs_no_other():
    q = query(torch.float32, 3, 2, 16)
    seen = [span(torch.float32, 3, 2, K, 16, (0, 0, K), one=True, seed=K) for K in (30, 150)]
    got = check(q, seen, torch.full((2,), 0.1))
    assert (got[:2] == 0).all() and (got[2] != 0).all()


def test_keys_that_nobody_sees_are_not_read():
    seen = span(torch.float32, 2, 2, 300, 16, (7, 0), one=True)
    hidden = (seen.mask[:, 0, 0] != 0)[:, None, :, None]
    seen.keys.masked_fill_(hidden, torch.nan)
    seen.norms.masked_fill_(hidden, torch.nan)
    assert torch.isfinite(attend(query(torch.float32, 2, 2, 16), [seen], torch.full((2,), 0.1))).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_large_scores_do_not_overflow(scale, multiprocessors):
    q, seen = query(torch.float32, 2, 2, 16), span(torch.float32, 2, 2, 290, 16, (290, 200), one=False)
    got, expected = attend(q, [seen], scale, multiprocessors), exact(q, [seen], scale)
    # A score's own rounding, 2^-24 of up to 40 scale, is the relative error of its weight.
    assert (got - expected).norm() <= (1e-6 + 1e-5 * scale) * expected.norm()


@settings(deadline=None, max_examples=25)
@given(
    B=st.integers(1, 3),
    H=st.integers(1, 3),
    D=st.sampled_from([2, 6, 16, 64]),
    spans=st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=1, max_size=3),
    one=st.booleans(),
    rope=st.booleans(),
    multiprocessors=st.sampled_from([1, 2, 132]),
    data=st.data(),
)
def test_any_shapes_lengths_and_splits(B, H, D, spans, one, rope, multiprocessors, data):
    seen = [
        span(
            torch.float32, B, H, K, D, data.draw(st.tuples(*[st.integers(0, K)] * B)),
            one=one, rope=rope and one, shared=shared, seed=i,
        )
        for i, (K, shared) in enumerate(spans)
    ]  # fmt: skip
    check(query(torch.float32, B, H, D), seen, torch.linspace(0.5, 1, H) / D, multiprocessors=multiprocessors)


@pytest.mark.parametrize("multiprocessors", [1, 8, 132])
def test_splits_are_as_many_as_keep_the_device_busy_and_have_a_tile_each(multiprocessors, monkeypatch):
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return split_kernel[grid]

    monkeypatch.setattr("gkachat.attention.kernels.decode_triton.split_kernel", Kernel())
    check(
        query(torch.float32, 4, 2, 16), [span(torch.float32, 4, 2, 600, 16, (600, 1, 0, 300), one=True)],
        torch.ones(2), multiprocessors=multiprocessors,
    )  # fmt: skip
    tiles = -(-600 // shape(16)[1])
    assert grids == [(2, 4, {1: 2, 8: tiles, 132: tiles}[multiprocessors])]


def test_several_new_tokens_take_the_plain_form():
    q = torch.randn(2, 3, 2, 16)
    seen = [Keys(k := torch.randn(2, 2, 9, 16), k, torch.zeros(2, 1, 3, 9))]
    assert torch.equal(attend(q, seen, 0.3), cache.attend(q, seen, 0.3))


@pytest.fixture(params=VARIANTS)
def made(request):
    """A layer with a window of 128, one without."""
    torch.manual_seed(0)
    config = GPTConfig(depth=2, vocab_size=64, sequence_len=190, n_embd=32, head_dim=16, **VARIANTS[request.param])
    model = GPT(config).eval()
    for name, p in model.named_parameters():
        if name.endswith(("c_proj.weight", "lm_head.weight")):
            torch.nn.init.normal_(p, std=0.2)
    return model


def with_the_kernel(model):
    for block in model.blocks:
        block.attn.decoding = Backend("triton", "a test", partial(attend, multiprocessors=1))
    return model


@torch.inference_mode()
def test_a_model_decodes_with_it_what_it_gives_without_a_cache(made):
    """Ragged rows that go on from a shared prefix, one token at a time, while ring buffers begin anew."""
    assert [block.attn.window for block in made.blocks] == [128, None]
    idx, shared, starts, steps = torch.randint(64, (2, 190)), 20, (150, 172), 12
    idx[:, :shared] = idx[0, :shared]
    expected, model = made(idx), with_the_kernel(made)
    prefix = model.make_cache(1, shared, block=32)
    model.decode(idx[:1, :shared], prefix, slice(0, 1))
    rows = model.make_cache(2, 190 - shared, block=32, prefix=prefix)
    for row, start in enumerate(starts):
        for part in idx[row : row + 1, shared:start].split(32, dim=1):
            model.decode(part, rows, slice(row, row + 1))
    assert rows.layers[0][0].size(2) == 159 and starts[0] < shared + 159 < starts[1] + steps
    for step in range(steps):
        new, wanted = (torch.stack([t[row, start + step] for row, start in enumerate(starts)]) for t in (idx, expected))
        torch.testing.assert_close(model.decode(new[:, None], rows, slice(0, 2)), wanted, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_model_in_bfloat16_is_as_near_to_float32_with_it_as_without(made):
    idx = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = made(idx)[:, -1]

    def error():
        kept = made.make_cache(2, 40, block=39)
        made.decode(idx[:, :39], kept, slice(0, 2))
        return (made.decode(idx[:, 39:], kept, slice(0, 2)) - expected).norm() / expected.norm()

    made.prepare(torch.bfloat16)
    plain = error()
    with_the_kernel(made)
    assert 0 < error() <= max(1.25 * plain, 0.01)  # 2^-8 a rounding


def outside_the_interpreter(*command):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


TRACE = """
import json
import torch, torch.utils._triton
torch.utils._triton.has_triton = lambda: True  # Dynamo looks for kernels where there is a GPU
from gkachat.attention.cache import Keys
from gkachat.attention.kernels.decode_triton import attend
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

def step(q, x, norms, mask, table, sigma):
    return attend(q, [Keys(x[:1], x[:1], mask, norms[:1], (table, table)), Keys(x, x + 1, mask)], sigma)

def backend(graph, inputs):
    found = [n.kwargs["kernel_idx"] for n in graph.graph.nodes if "triton_kernel" in str(n.target)]
    print(json.dumps([kernel_side_table.get_kernel(i).fn.__name__ for i in found]))
    raise KeyboardInterrupt  # nothing to run it on

x = torch.randn(2, 3, 70, 16)
q, table = torch.randn(2, 1, 3, 16), torch.ones(1, 1, 70, 8)
for dynamic in (False, True):
    torch._dynamo.reset()
    try:
        torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)(
            q, x, x.square().sum(-1, keepdim=True), torch.zeros(2, 1, 1, 70), table, torch.ones(3)
        )
    except KeyboardInterrupt:
        pass
"""


def test_torch_compile_takes_it_whole():
    assert outside_the_interpreter("-c", TRACE) == 2 * [["split_kernel", "split_kernel", "combine_kernel"]]
