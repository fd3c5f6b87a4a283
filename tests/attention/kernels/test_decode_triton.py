"""The decode kernel in Triton's interpreter against float64, and models that decode with it."""

from functools import partial

import pytest
import torch
from conftest import live_model
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from gkachat.attention.features import rope_at
from gkachat.attention.kernels import decode, reference
from gkachat.attention.kernels.choose import Kernel
from gkachat.attention.kernels.decode_triton import attend, decode_attention, split_kernel, tile_shape
from gkachat.attention.qkv import QKV, KVSlice, Taps
from gkachat.config import GKAConfig

# Relative to the norm of the exact result. The kernel rounds its result alone: half a unit in the last place of 24, 11
# and 8 bits; in float32, sums over D round too.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "float16", "bfloat16"])
HEADS = pytest.mark.parametrize(  # heads that fill a tile and that do not, in float32; every dtype
    ("D", "dtype"), [*((D, torch.float32) for D in (16, 24, 128)), (64, torch.float16), (64, torch.bfloat16)]
)
VARIANTS = {
    "softmax": {"attention": "softmax"},
    "gka": {"attention": "gka"},
    "gka rope, without self": {"attention": "gka", "gka": GKAConfig(include_self=False, rope=True)},
    "gka_conv": {"attention": "gka_conv"},
}


def exact(qkv, slices):
    """Return the reference's result in float64."""
    inv_sigma2 = None if qkv.sigma is None else qkv.sigma.double().pow(-2)[:, None, None]
    if inv_sigma2 is not None and slices[0].key_norms is None:  # features of one norm: q.k / sigma^2
        qkv = qkv._replace(scale=inv_sigma2, sigma=None)
    rope = [part.rope and tuple(table.double() for table in part.rope) for part in slices]
    wide = [
        KVSlice(part.k.double(), part.v.double(), part.mask, rope=r, key_bias=part.key_bias)
        for part, r in zip(slices, rope, strict=True)
    ]
    q = qkv.q.double()
    return reference.attend_cached(qkv._replace(q=q, v=q), wide)


def drawn_slice(dtype, B, H, S, D, lengths, *, shared_kv, rope=False, prefix=False, biases=False, seed=0):
    """Cached keys in a ring buffer's order; row b sees the first lengths[b]. With `shared_kv` they have norms."""
    generator = torch.Generator().manual_seed(seed)
    rows = 1 if prefix else B
    buffer = torch.randn(rows + 1, H, S + 5, D, generator=generator).to(dtype)  # the keys are a view of it
    k = buffer[1:, :, :S]
    v = k if shared_kv else torch.randn(rows, H, S, D, generator=generator).to(dtype)
    order = torch.randperm(S, generator=generator)
    mask = torch.zeros(B, 1, 1, S).masked_fill_(order >= torch.tensor(lengths)[:, None, None, None], -torch.inf)
    norms, key_bias = k.float().square().sum(-1, keepdim=True), 3 * torch.rand(rows, H, S, 1, generator=generator)
    norms, key_bias = torch.stack((norms, key_bias))  # with the same strides, as in a cache
    slice_rope = rope_at(order.expand(rows, 1, -1), D) if rope else None
    return KVSlice(k, v, mask, norms if shared_kv else None, slice_rope, key_bias=key_bias if biases else None)


def query(dtype, B, H, D, seed=1):
    return torch.randn(B, 1, H, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(q, scale):
    """Queries with a scale that is a number, or 1 / sigma^2 of each head."""
    return QKV(q, q, q, sigma=scale.rsqrt()) if torch.is_tensor(scale) else QKV(q, q, q, scale=scale)


def check(q, slices, scale, **options):
    got, expected = attend(qkv(q, scale), slices, **options), exact(qkv(q, scale), slices)
    assert got.shape == q.shape and got.dtype == q.dtype
    # Values of both signs cancel, and the sums over S round relative to what was summed.
    summed = exact(qkv(q, scale), [part._replace(v=part.v.abs()) for part in slices]).norm()
    assert (got.double() - expected).norm() <= TOLERANCE[q.dtype] * expected.norm() + 2**-23 * summed
    return got


@HEADS
@pytest.mark.parametrize("rope", [False, True])
def test_gka_decodes_as_by_the_definition(dtype, rope, D):
    slices = [drawn_slice(dtype, 2, 2, 70, D, (70, 9), shared_kv=True, rope=rope)]
    check(query(dtype, 2, 2, D), slices, torch.tensor([1.0, 4.0]) / D)


@HEADS
def test_softmax_decodes_as_by_the_definition(dtype, D):
    check(query(dtype, 2, 2, D), [drawn_slice(dtype, 2, 2, 70, D, (9, 70), shared_kv=False)], D**-0.5)


@HEADS
def test_keys_and_values_that_are_convolutions_decode_as_by_the_definition(dtype, D):
    generator, q = torch.Generator().manual_seed(0), query(dtype, 2, 2, D)
    weights = [torch.randn(4, 2, D, generator=generator) for _ in range(2)]
    slices = []
    for S, lengths, prefix in ((40, (40, 40), True), (70, (70, 9), False)):
        part = drawn_slice(dtype, 2, 2, S + 3, D, lengths, shared_kv=True, prefix=prefix, biases=True)
        key_bias = part.key_bias[:, :, 3:].contiguous()
        slices.append(part._replace(mask=part.mask[..., 3:], key_norms=None, key_bias=key_bias))
    taps = Taps(q, *weights)
    wide = [part._replace(k=part.k.double()) for part in slices]
    expected = exact(QKV(q, q, q, scale=0.3), [part.convolved(taps) for part in wide])
    for kernel, tolerance in ((attend, TOLERANCE[dtype]), (decode.attend, 4 * TOLERANCE[dtype])):  # which rounds more
        got = kernel(QKV(q, q, q, scale=0.3, taps=taps), slices)
        assert got.shape == q.shape and got.dtype == dtype
        assert (got.double() - expected).norm() <= tolerance * expected.norm()


@DTYPES
@pytest.mark.parametrize("shared_kv", [True, False])
def test_it_agrees_with_the_kernel_in_pytorch(dtype, shared_kv):
    q, scale = query(dtype, 3, 2, 16), torch.tensor([0.1, 0.2])
    slices = [
        drawn_slice(dtype, 3, 2, 40, 16, (40, 40, 12), shared_kv=shared_kv, prefix=True),
        drawn_slice(dtype, 3, 2, 21, 16, (1, 21, 5), shared_kv=shared_kv, seed=3),
    ]
    got, plain = check(q, slices, scale), decode.attend(qkv(q, scale), slices)  # which rounds weights and parts too
    assert (got.double() - plain.double()).norm() <= 4 * TOLERANCE[dtype] * plain.double().norm()


def test_bandwidths_need_not_be_contiguous():
    q, slices = query(torch.float32, 2, 3, 16), [drawn_slice(torch.float32, 2, 3, 40, 16, (40, 9), shared_kv=True)]
    for sigma in (torch.tensor(3.0).expand(3), torch.tensor([[2.0, 0.1], [3.0, 0.1], [4.0, 0.1]])[:, 0]):
        got, expected = (attend(QKV(q, q, q, sigma=s), slices) for s in (sigma, sigma.contiguous()))
        assert torch.equal(got, expected)


def test_a_row_that_sees_nothing_gives_zeros_and_disturbs_no_other():
    q = query(torch.float32, 3, 2, 16)
    slices = [drawn_slice(torch.float32, 3, 2, S, 16, (0, 0, S), shared_kv=True, seed=S) for S in (30, 150)]
    got = check(q, slices, torch.full((2,), 0.1))
    assert (got[:2] == 0).all() and (got[2] != 0).all()


def test_keys_that_no_row_sees_are_not_read():
    part = drawn_slice(torch.float32, 2, 2, 300, 16, (7, 0), shared_kv=True, biases=True)
    hidden = (part.mask[:, 0, 0] != 0)[:, None, :, None]
    for tensor in (part.k, part.key_norms, part.key_bias):
        tensor.masked_fill_(hidden, torch.nan)
    got = attend(qkv(query(torch.float32, 2, 2, 16), torch.full((2,), 0.1)), [part])
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_large_scores_do_not_overflow(scale, multiprocessors):
    q, slices = query(torch.float32, 2, 2, 16), [drawn_slice(torch.float32, 2, 2, 290, 16, (290, 200), shared_kv=False)]
    got, expected = attend(qkv(q, scale), slices, multiprocessors), exact(qkv(q, scale), slices)
    # A score's own rounding, 2^-24 of up to 40 scale, is the relative error of its weight.
    assert (got - expected).norm() <= (1e-6 + 1e-5 * scale) * expected.norm()


@settings(deadline=None, max_examples=25)
@given(
    B=st.integers(1, 3),
    H=st.integers(1, 3),
    D=st.sampled_from([2, 6, 16, 64]),
    sizes=st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=1, max_size=3),
    shared_kv=st.booleans(),
    rope=st.booleans(),
    biases=st.booleans(),
    multiprocessors=st.sampled_from([1, 2, 132]),
    data=st.data(),
)
def test_any_shapes_lengths_and_splits(B, H, D, sizes, shared_kv, rope, biases, multiprocessors, data):
    slices = [
        drawn_slice(
            torch.float32, B, H, S, D, data.draw(st.tuples(*[st.integers(0, S)] * B)),
            shared_kv=shared_kv, rope=rope and shared_kv, prefix=prefix, biases=biases, seed=i,
        )
        for i, (S, prefix) in enumerate(sizes)
    ]  # fmt: skip
    check(query(torch.float32, B, H, D), slices, torch.linspace(0.5, 1, H) / D, multiprocessors=multiprocessors)


@pytest.mark.parametrize("multiprocessors", [1, 8, 132])
def test_splits_keep_the_device_busy_and_have_at_least_a_tile_each(multiprocessors, monkeypatch):
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return split_kernel[grid]

    monkeypatch.setattr("gkachat.attention.kernels.decode_triton.split_kernel", Kernel())
    slices = [drawn_slice(torch.float32, 4, 2, 600, 16, (600, 1, 0, 300), shared_kv=True)]
    check(query(torch.float32, 4, 2, 16), slices, torch.ones(2), multiprocessors=multiprocessors)
    tiles = -(-600 // tile_shape(16)[1])
    assert grids == [(2 * 4, {1: 2, 8: tiles, 132: tiles}[multiprocessors])]


def test_several_new_tokens_run_on_the_kernel_in_pytorch():
    q, k = torch.randn(2, 3, 2, 16), torch.randn(2, 2, 9, 16)
    slices = [KVSlice(k, k, torch.zeros(2, 1, 3, 9))]
    assert torch.equal(attend(qkv(q, 0.3), slices), decode.attend(qkv(q, 0.3), slices))


@pytest.fixture(params=VARIANTS)
def made(request):
    """A layer with a window of 129, and one without."""
    model = live_model(**VARIANTS[request.param], sequence_len=190)
    assert [block.attn.window for block in model.blocks] == [129, None]
    return model


def use_triton(model):
    for block in model.blocks:
        block.attn.decode_kernel = Kernel("triton", "a test", partial(attend, multiprocessors=1))


@torch.inference_mode()
def read(model, idx, cache, row=0, rows=1):
    for part in idx.split(cache.block, dim=1):
        logits = model(part, cache=cache.step(slice(row, row + rows), part.size(1)), logits_to_keep=1)
    return logits[:, -1]


@torch.inference_mode()
def test_a_model_decodes_with_it_to_the_logits_of_the_whole_text(made):
    """Rows of different lengths continue a shared prefix, token by token, while their ring buffers start over."""
    idx, shared, starts, steps = torch.randint(64, (2, 190)), 20, (150, 178), 6
    idx[:, :shared] = idx[0, :shared]
    expected = made(idx)
    use_triton(made)
    prefix = made.make_cache(1, shared, block=32)
    read(made, idx[:1, :shared], prefix)
    cache = made.make_cache(2, 190 - shared, block=32, prefix=prefix)
    for row, start in enumerate(starts):
        read(made, idx[row : row + 1, shared:start], cache, row)
    slots = 160 + made.blocks[0].attn.taps - 1  # a window, a block, and what the first key is made of
    assert cache.step(slice(0, 2), 1).layer(0).slots == slots and starts[0] < shared + slots < starts[1] + steps
    cache.lengths = list(starts)
    for step in range(steps):
        new, wanted = (torch.stack([t[row, start + step] for row, start in enumerate(starts)]) for t in (idx, expected))
        torch.testing.assert_close(read(made, new[:, None], cache, rows=2), wanted, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_model_in_bfloat16_is_as_near_to_float32_with_it_as_without(made):
    idx = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = made(idx)[:, -1]

    def error():
        cache = made.make_cache(2, 40, block=39)
        read(made, idx[:, :39], cache, rows=2)
        return (read(made, idx[:, 39:], cache, rows=2) - expected).norm() / expected.norm()

    made.prepare(torch.bfloat16)
    plain = error()
    use_triton(made)
    assert 0 < error() <= max(1.25 * plain, 0.01)  # 2^-8 per rounding


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_takes_it_as_one_operator(dynamic):
    """Compiled into the step, the kernels would be written anew, for a GPU that no test has."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes].count(torch.ops.gkachat.decode_attention.default))
        return graph.forward

    def step(q, x, norms, mask, table, sigma):
        slices = [KVSlice(x[:1], x[:1], mask, norms[:1], (table, table)), KVSlice(x, x + 1, mask)]
        return attend(QKV(q, q, q, sigma=sigma), slices)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)
    for S in (70, 90):
        x, table = torch.randn(2, 3, S, 16), torch.rand(1, 1, S, 8)
        norms, mask = x.square().sum(-1, keepdim=True), torch.zeros(2, 1, 1, S)
        inputs = (torch.randn(2, 1, 3, 16), x, norms, mask, table, torch.ones(3))
        assert torch.equal(compiled(*inputs), step(*inputs))
    assert graphs == ([1] if dynamic else [1, 1])
    torch.library.opcheck(
        decode_attention, (inputs[0], [x], [None], [mask], [norms], *[[None]] * 3, None, None, None, 0.5, 2)
    )


def test_more_rows_and_heads_than_a_grid_has_room_for_on_its_later_axes():
    """A GPU's grid takes 2^31 - 1 programs on its first axis, and 65,535 on the others."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    with pytest.MonkeyPatch.context() as patch:
        for name in ("split_kernel", "combine_kernel"):
            patch.setattr(f"gkachat.attention.kernels.decode_triton.{name}", Kernel())
        k = torch.zeros(1, 1, 1, 2).expand(70_000, 2, 5000, 2)
        attend(
            qkv(torch.zeros(70_000, 1, 2, 2), 1.0), [KVSlice(k, k, torch.zeros(1, 1, 1, 1).expand(70_000, 1, 1, 5000))]
        )
    assert [grid[0] for grid in grids] == [140_000, 140_000] and max(grids[0][1:]) <= 65_535
