"""Batches: what is in them, and that they depend on nothing but the step."""

from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gkachat.config import DataConfig
from gkachat.data.loader import IGNORE, Loader, Prefetcher, count_rows, make_plan, pack_histogram, val_batches
from gkachat.data.shards import Documents, Split, write_shards
from gkachat.data.sources import Corpus
from gkachat.tokenizer import train_tokenizer

BOS = 10**6
PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=60)


class InMemory(list):
    """Documents of a split's shards, without files."""

    n_shards = property(len)

    def shard(self, index):
        return self[index] if index < len(self) else None


def documents_of(lengths, tokens):
    return Documents(np.concatenate(([0], np.cumsum(lengths))), lambda: tokens)


def split_of(lengths, n_shards=3):
    """Documents of these lengths over some shards; their tokens are 1, 2, 3 and so on to the end of the last one."""
    lengths = np.asarray(lengths)
    first, shards = 1, InMemory()
    for part in np.array_split(lengths, n_shards):
        if len(part):
            shards.append(documents_of(part, np.arange(first, first + part.sum())))
            first += part.sum()
    return shards


def some_lengths(n=150, longest=150):
    return np.random.default_rng(0).integers(1, longest, n)


def loader_of(split, sequence_len=32, batch_rows=4, **options):
    return Loader(split, sequence_len=sequence_len, batch_rows=batch_rows, bos=BOS, **options)


def val_of(split, sequence_len=32, batch_rows=4, **options):
    return val_batches(split, sequence_len=sequence_len, batch_rows=batch_rows, bos=BOS, **options)


def stack(batches):
    """Inputs and targets of batches, one below the other."""
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def epoch_of(loader, epoch=0):
    steps = loader.steps_per_epoch
    return stack(loader.batch(step) for step in range(epoch * steps, (epoch + 1) * steps))


def scored(targets):
    """The document tokens that are predicted, in order of size."""
    return sorted(targets[(targets != IGNORE) & (targets != BOS)].tolist())


def pieces_of(inputs, targets):
    """What stands between one BOS and the next, row by row."""
    for row, last in zip(inputs.tolist(), targets.tolist(), strict=True):
        tokens = [row[0]] + [token for token in last if token != IGNORE]
        starts = [i for i, token in enumerate(tokens) if token == BOS]
        yield from (tokens[a + 1 : b] for a, b in pairwise([*starts, len(tokens)]))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_batch_has_the_shape_and_type_that_training_wants():
    for tensor in loader_of(split_of(some_lengths()), sequence_len=32, batch_rows=4).batch(0):
        assert tensor.shape == (4, 32)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()


def test_every_row_starts_with_bos():
    inputs, _ = epoch_of(loader_of(split_of(some_lengths())))
    assert len(inputs) > 100
    assert (inputs[:, 0] == BOS).all()


def test_targets_are_inputs_one_position_on():
    inputs, targets = epoch_of(loader_of(split_of(some_lengths())))
    filled = targets[:, :-1] != IGNORE
    assert torch.equal(inputs[:, 1:][filled], targets[:, :-1][filled])
    assert (~filled).any()
    assert (inputs[:, 1:][~filled] == 0).all()


def test_only_the_end_of_a_row_is_not_scored():
    _, targets = epoch_of(loader_of(split_of(some_lengths())))
    ignored = targets == IGNORE
    assert not (ignored[:, :-1] & ~ignored[:, 1:]).any()
    assert not ignored[:, 0].any()


def test_the_largest_token_id_is_not_taken_for_one_that_is_ignored():
    split = InMemory([documents_of([8], np.full(8, 65_535, dtype=np.uint16))])
    _, targets = loader_of(split, sequence_len=8, batch_rows=1).batch(0)
    assert targets.tolist() == [[65_535] * 8]


@PROPERTY
@given(LENGTHS, st.integers(2, 64), st.integers(0, 3))
def test_every_token_is_scored_exactly_once_an_epoch_when_no_row_is_dropped(lengths, sequence_len, epoch):
    loader = loader_of(split_of(lengths), sequence_len, batch_rows=1)
    assert scored(epoch_of(loader, epoch)[1]) == list(range(1, sum(lengths) + 1))
    assert loader.loss_report["tokens_lost"] == 0


@PROPERTY
@given(LENGTHS, st.integers(2, 64), st.integers(1, 4), st.integers(0, 3))
def test_no_token_is_scored_twice_an_epoch_and_the_report_says_how_many_never(lengths, sequence_len, rows, epoch):
    n_rows = make_plan(np.array(lengths), sequence_len, None).n_rows
    loader = loader_of(split_of(lengths), sequence_len, batch_rows=min(rows, n_rows))
    tokens = scored(epoch_of(loader, epoch)[1])
    assert len(tokens) == len(set(tokens))
    if epoch == 0:
        assert loader.loss_report["tokens_lost"] == pytest.approx(1 - len(tokens) / sum(lengths))


def test_the_report_says_how_many_positions_are_not_scored():
    loader = loader_of(split_of(some_lengths()), sequence_len=32, batch_rows=1)
    _, targets = epoch_of(loader)
    unused = (targets == IGNORE).sum().item() / (len(targets) * 33)
    assert 0 < loader.loss_report["positions_unused"] == pytest.approx(unused)


@PROPERTY
@given(LENGTHS, st.integers(2, 64))
def test_the_pieces_of_a_document_go_on_where_the_one_before_ended(lengths, sequence_len):
    pieces = sorted(pieces_of(*epoch_of(loader_of(split_of(lengths), sequence_len, batch_rows=1))))
    expected, first = [], 1
    for length in lengths:
        document = list(range(first, first + length))
        expected += [document[i : i + sequence_len] for i in range(0, length, sequence_len)]
        first += length
    assert pieces == expected


@pytest.mark.parametrize("step", [0, 1, 7, 100, 999])
def test_a_batch_depends_on_its_step_alone(step):
    split = split_of(some_lengths())
    loader = loader_of(split, seed=3)
    for other in (500, step + 1, 2):
        loader.batch(other)
    assert same(loader.batch(step), loader_of(split, seed=3).batch(step))


def test_step_ten_thousand_is_the_same_when_walked_to():
    split = split_of(some_lengths(80))
    walked = loader_of(split, batch_rows=2)
    for step in range(10_001):
        batch = walked.batch(step)
    assert 10 * walked.steps_per_epoch < 10_000
    assert same(batch, loader_of(split, batch_rows=2).batch(10_000))


def test_seeds_and_epochs_have_their_own_order():
    split = split_of(some_lengths())
    loader = loader_of(split, batch_rows=1)
    orders = [epoch_of(loader, epoch) for epoch in range(3)]
    orders += [epoch_of(loader_of(split, batch_rows=1, seed=seed)) for seed in (1, 2)]
    assert len({inputs.numpy().tobytes() for inputs, _ in orders}) == 5
    assert len({tuple(scored(targets)) for _, targets in orders}) == 1
    assert len({tuple(sorted(map(tuple, inputs.tolist()))) for inputs, _ in orders}) == 5  # other neighbours, too


def test_every_part_of_a_shard_mixes_long_and_short_pieces():
    loader = loader_of(split_of([*[32] * 50, *[7] * 200], n_shards=1), batch_rows=20)
    for step in range(4):
        assert {len(piece) for piece in pieces_of(*loader.batch(step))} == {7, 32}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_out_the_batch_of_a_single_one(world_size):
    split = split_of(some_lengths())
    alone = loader_of(split, batch_rows=2 * world_size)
    ranks = [loader_of(split, batch_rows=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {rank.steps_per_epoch for rank in ranks} == {alone.steps_per_epoch}
    for step in (0, 1, alone.steps_per_epoch - 1, alone.steps_per_epoch, 100):
        assert same(stack(rank.batch(step) for rank in ranks), alone.batch(step))
    assert len({rank.loss_report["tokens_lost"] for rank in ranks} | {alone.loss_report["tokens_lost"]}) == 1


@pytest.mark.parametrize("there", [1, 2])
def test_batches_are_the_same_while_later_shards_are_still_being_made(there):
    whole = split_of(some_lengths(), n_shards=3)
    looked_for = []

    class Growing(InMemory):
        n_shards = None

        def shard(self, index):
            looked_for.append(index)
            return super().shard(index)

    growing, expected = loader_of(Growing(whole)), loader_of(whole)
    last = sum(count_rows(documents.length, 32) for documents in whole[:there]) // 4
    for step in range(last):
        assert same(growing.batch(step), expected.batch(step))
        assert growing.n_targets(step) == expected.n_targets(step)
    assert set(looked_for) == set(range(there)) and not growing.knows_epoch


@PROPERTY
@given(LENGTHS, st.integers(2, 64), st.lists(st.integers(0, 10**6), min_size=2, max_size=4))
def test_every_order_has_the_same_number_of_rows(lengths, sequence_len, seeds):
    plans = [make_plan(np.array(lengths), sequence_len, np.random.default_rng(seed)) for seed in seeds]
    assert {plan.n_rows for plan in plans} == {make_plan(np.array(lengths), sequence_len, None).n_rows}


def test_the_number_of_steps_is_that_of_the_whole_batches():
    split = split_of([32] * 103)
    assert loader_of(split, batch_rows=4).steps_per_epoch == 25
    assert {loader_of(split, batch_rows=5, world_size=2, seed=seed).steps_per_epoch for seed in range(5)} == {10}
    loader = loader_of(split, batch_rows=4)
    assert [len(set(scored(epoch_of(loader, epoch)[1]))) for epoch in range(4)] == [3200] * 4


@pytest.mark.parametrize("options", [{"batch_rows": 11}, {"batch_rows": 6, "world_size": 2}])
def test_a_split_too_small_for_a_step_is_an_error(options):
    split = split_of([32] * 10)
    assert loader_of(split, batch_rows=10).steps_per_epoch == 1
    with pytest.raises(ValueError, match=r"fills 10 rows of 32 tokens, a step takes 1[12]: give more data"):
        loader_of(split, **options)


@PROPERTY
@given(LENGTHS, st.integers(2, 64), st.integers(1, 9))
def test_validation_covers_the_split_exactly_once(lengths, sequence_len, rows):
    inputs, targets = stack(val_of(split_of(lengths), sequence_len, rows))
    assert scored(targets) == list(range(1, sum(lengths) + 1))
    assert (inputs[:, 0] == BOS).all()


def test_validation_has_one_order_whatever_the_size_of_its_batches():
    split = split_of(some_lengths())
    rows = stack(val_of(split, batch_rows=1))
    for batch_rows in (1, 3, 4, 1000):
        batches = list(val_of(split, batch_rows=batch_rows))
        assert {len(inputs) for inputs, _ in batches[:-1]} <= {batch_rows}
        assert same(stack(batches), rows)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (32, 1), (33, 2), (320, 10), (10**9, None)])
def test_a_part_of_validation_is_its_first_rows(tokens, rows):
    split = split_of(some_lengths())
    inputs, targets = stack(val_of(split))
    assert same(stack(val_of(split, tokens=tokens)), (inputs[:rows], targets[:rows]))


def test_a_part_of_validation_mixes_long_and_short_pieces():
    split = split_of([*[32] * 50, *[7] * 100], n_shards=1)
    _, targets = stack(val_of(split, tokens=32 * 20))
    assert {len(piece) for piece in pieces_of(torch.full((20, 1), BOS), targets)} == {7, 32}


@PROPERTY
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, 30), max_size=n + 1))))
def test_packing_uses_every_item_once_and_fills_no_row_beyond_its_capacity(capacity_and_counts):
    capacity, counts = capacity_and_counts
    patterns = pack_histogram(np.array(counts, dtype=np.int64), capacity)
    assert all(times > 0 and 0 < sum(row) <= capacity for row, times in patterns)
    used = [size for row, times in patterns for size in row * times]
    assert sorted(used) == [size for size, count in enumerate(counts) if size for _ in range(count)]
    # A row is left only when nothing fits any more.
    assert sum(times for row, times in patterns if 2 * sum(row) <= capacity) <= 1


@pytest.mark.parametrize(
    ("sizes", "capacity", "rows"),
    [
        ([5, 4, 3, 2, 2], 8, [[5, 3], [4, 2, 2]]),
        ([8, 8, 1], 8, [[8], [8], [1]]),
        ([6, 3, 3, 3, 2], 9, [[6, 3], [3, 3, 2]]),
        ([2, 2, 2, 2, 2], 5, [[2, 2], [2, 2], [2]]),
    ],
)
def test_a_row_takes_the_longest_item_left_and_then_the_longest_that_fit(sizes, capacity, rows):
    assert [row for row, times in pack_histogram(np.bincount(sizes), capacity) for _ in range(times)] == rows


def test_little_of_the_standard_library_is_lost(tmp_path):
    corpus = Corpus(DataConfig(max_chars=3_000_000))
    tokenizer = train_tokenizer((text[:10_000] for _, text in islice(corpus, 60)), 1024)
    write_shards(corpus, tokenizer, tmp_path, source={}, shard_chars=1_000_000)
    split = Split(tmp_path, "train", tokenizer)
    loader = Loader(split, sequence_len=256, batch_rows=16, bos=tokenizer.bos)
    assert loader.loss_report["tokens_lost"] <= 0.05
    assert loader.loss_report["positions_unused"] <= 0.05

    _, targets = epoch_of(loader)
    n_tokens = ((targets != IGNORE) & (targets != tokenizer.bos)).sum().item()
    n_stored = sum(documents.length.sum() for documents in split)
    assert 0.95 * n_stored <= n_tokens <= n_stored
    assert (targets != IGNORE).float().mean() >= 0.95


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_number_of_targets_of_a_step_is_known_without_reading_them(world_size):
    made = [loader_of(split_of(some_lengths()), rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(2 * made[0].steps_per_epoch):
        counted = sum(int((one.batch(step)[1] >= 0).sum()) for one in made)
        assert {one.n_targets(step) for one in made} == {counted}


def test_prefetched_batches_are_the_loaders_wherever_one_jumps_to():
    batches, plain = Prefetcher(loader_of(split_of(some_lengths())), pinned=False), loader_of(split_of(some_lengths()))
    for step in (0, 1, 2, 7, 8, 3, 4, plain.steps_per_epoch - 1, plain.steps_per_epoch, 0):
        (idx, targets), n_targets = batches.get(step)
        expected = plain.batch(step)
        assert torch.equal(idx, expected[0]) and torch.equal(targets, expected[1])
        assert n_targets == plain.n_targets(step)
