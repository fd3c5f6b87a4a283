"""Batches: what they hold, and that they depend on the step alone."""

from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gkachat.config import DataConfig
from gkachat.data.loader import IGNORE, Loader, Prefetcher, val_batches
from gkachat.data.packing import count_rows
from gkachat.data.shards import Documents, Split, write_shards
from gkachat.data.sources import Corpus
from gkachat.tokenizer import train_tokenizer

BOS = 10**6
PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=60)
SOME_LENGTHS = np.random.default_rng(0).integers(1, 150, 150)


class InMemorySplit(list):
    n_shards = property(len)

    def shard(self, index):
        return self[index] if index < len(self) else None


def documents_of(lengths, tokens):
    return Documents(np.concatenate(([0], np.cumsum(lengths))), lambda: tokens)


def split_of(lengths=SOME_LENGTHS, n_shards=3):
    """Documents of these lengths; the first shard's tokens are 1, 2, 3 and so on, the next shard's go on from there."""
    first, shards = 1, InMemorySplit()
    for part in np.array_split(np.asarray(lengths), n_shards):
        if len(part):
            shards.append(documents_of(part, np.arange(first, first + part.sum())))
            first += part.sum()
    return shards


def loader_of(split, sequence_len=32, rows_per_step=4, **options):
    return Loader(split, sequence_len=sequence_len, rows_per_step=rows_per_step, bos=BOS, **options)


def val_of(split, sequence_len=32, batch_rows=4, **options):
    return val_batches(split, sequence_len=sequence_len, batch_rows=batch_rows, bos=BOS, **options)


def stack(batches):
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def epoch_of(loader, epoch=0):
    steps = loader.steps_per_epoch
    return stack(loader.batch(step) for step in range(epoch * steps, (epoch + 1) * steps))


def text_targets(targets):
    """Sorted targets that are tokens of documents."""
    return sorted(targets[(targets != IGNORE) & (targets != BOS)].tolist())


def pieces_of(inputs, targets):
    """Tokens between one BOS and the next, row by row."""
    for row, last in zip(inputs.tolist(), targets.tolist(), strict=True):
        tokens = [row[0]] + [token for token in last if token != IGNORE]
        starts = [i for i, token in enumerate(tokens) if token == BOS]
        yield from (tokens[a + 1 : b] for a, b in pairwise([*starts, len(tokens)]))


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_rows_start_with_bos_and_have_the_next_inputs_as_targets_up_to_their_free_end():
    for tensor in loader_of(split_of(), sequence_len=32, rows_per_step=4).batch(0):
        assert tensor.shape == (4, 32) and tensor.dtype == torch.int64 and tensor.is_contiguous()
    inputs, targets = epoch_of(loader_of(split_of()))
    assert len(inputs) > 100 and (inputs[:, 0] == BOS).all()
    ignored = targets == IGNORE
    filled = ~ignored[:, :-1]
    assert torch.equal(inputs[:, 1:][filled], targets[:, :-1][filled])
    assert (~filled).any() and (inputs[:, 1:][~filled] == 0).all()
    assert not (ignored[:, :-1] & ~ignored[:, 1:]).any() and not ignored[:, 0].any()


def test_the_largest_token_id_is_a_target():
    split = InMemorySplit([documents_of([8], np.full(8, 65_535, dtype=np.uint16))])
    assert loader_of(split, sequence_len=8, rows_per_step=1).batch(0)[1].tolist() == [[65_535] * 8]


@PROPERTY
@given(LENGTHS, st.integers(2, 64), st.integers(1, 4), st.integers(0, 3))
def test_no_token_is_a_target_twice_an_epoch_and_dropped_ones_are_counted(lengths, sequence_len, rows, epoch):
    rows = min(rows, count_rows(np.array(lengths), sequence_len))
    loader = loader_of(split_of(lengths), sequence_len, rows_per_step=rows)
    tokens = text_targets(epoch_of(loader, epoch)[1])
    assert len(tokens) == len(set(tokens))
    if rows == 1:
        assert tokens == list(range(1, sum(lengths) + 1))
    if epoch == 0:
        assert loader.packing_waste()["tokens_dropped"] == pytest.approx(1 - len(tokens) / sum(lengths))


def test_empty_positions_are_counted():
    loader = loader_of(split_of(), sequence_len=32, rows_per_step=1)
    targets = epoch_of(loader)[1]
    empty = (targets == IGNORE).sum().item() / (len(targets) * 33)
    assert 0 < loader.packing_waste()["positions_empty"] == pytest.approx(empty)


@PROPERTY
@given(LENGTHS, st.integers(2, 64))
def test_pieces_are_the_documents_cut_to_the_sequence_length(lengths, sequence_len):
    documents = np.split(np.arange(1, sum(lengths) + 1), np.cumsum(lengths)[:-1])
    expected = [list(d[i : i + sequence_len]) for d in documents for i in range(0, len(d), sequence_len)]
    assert sorted(pieces_of(*epoch_of(loader_of(split_of(lengths), sequence_len, rows_per_step=1)))) == expected


@pytest.mark.parametrize("step", [0, 7, 10_000])
def test_a_batch_depends_on_its_step_alone(step):
    loader = loader_of(split_of(), seed=3)
    for other in (500, step + 1, 2):
        loader.batch(other)
    assert equal(loader.batch(step), loader_of(split_of(), seed=3).batch(step))


def test_seeds_and_epochs_have_their_own_rows_of_the_same_tokens():
    loader = loader_of(split_of(), rows_per_step=1)
    orders = [epoch_of(loader, epoch) for epoch in range(3)]
    orders += [epoch_of(loader_of(split_of(), rows_per_step=1, seed=seed)) for seed in (1, 2)]
    assert len({tuple(sorted(map(tuple, inputs.tolist()))) for inputs, _ in orders}) == 5
    assert len({tuple(text_targets(targets)) for _, targets in orders}) == 1


def test_every_part_of_a_shard_mixes_long_and_short_pieces():
    split = split_of([*[32] * 50, *[7] * 200], n_shards=1)
    loader = loader_of(split, rows_per_step=20)
    for batch in [*map(loader.batch, range(4)), stack(val_of(split, tokens=32 * 20))]:
        assert {len(piece) for piece in pieces_of(*batch)} == {7, 32}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_a_single_process_and_know_its_number_of_targets(world_size):
    split = split_of()
    single = loader_of(split, rows_per_step=6)
    ranks = [loader_of(split, rows_per_step=6, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(rank.batch(0)[0]) for rank in ranks} == {6 // world_size, -(-6 // world_size)}
    assert {rank.steps_per_epoch for rank in ranks} == {single.steps_per_epoch}
    for step in range(2 * single.steps_per_epoch):
        inputs, targets = single.batch(step)
        assert equal(stack(rank.batch(step) for rank in ranks), (inputs, targets))
        assert {loader.n_targets(step) for loader in (single, *ranks)} == {int((targets != IGNORE).sum())}
    assert all(rank.packing_waste() == single.packing_waste() for rank in ranks)


def test_batches_do_not_depend_on_shards_that_are_not_written_yet():
    whole, asked, n_written = split_of(n_shards=3), set(), 2

    class Growing(InMemorySplit):
        n_shards = None

        def shard(self, index):
            asked.add(index)
            return super().shard(index)

    growing, expected = loader_of(Growing(whole)), loader_of(whole)
    for step in range(sum(count_rows(documents.length, 32) for documents in whole[:n_written]) // 4):
        assert equal(growing.batch(step), expected.batch(step))
        assert growing.n_targets(step) == expected.n_targets(step)
    assert asked == set(range(n_written)) and not growing.knows_epoch


def test_an_epoch_has_whole_steps_only():
    split = split_of([32] * 103)
    assert loader_of(split, rows_per_step=4).steps_per_epoch == 25
    assert {loader_of(split, rows_per_step=10, world_size=2, seed=seed).steps_per_epoch for seed in range(5)} == {10}
    loader = loader_of(split, rows_per_step=4)
    assert [len(set(text_targets(epoch_of(loader, epoch)[1]))) for epoch in range(4)] == [3200] * 4


def test_a_split_too_small_for_a_step_is_an_error():
    split = split_of([32] * 10)
    assert loader_of(split, rows_per_step=10).steps_per_epoch == 1
    with pytest.raises(ValueError, match=r"fills 10 rows of 32 tokens, a step takes 12: give more data"):
        loader_of(split, rows_per_step=12, world_size=2)


def test_prefetched_batches_are_the_loaders_after_any_jump():
    batches, loader = Prefetcher(loader_of(split_of()), pinned=False), loader_of(split_of())
    for step in (0, 1, 2, 7, 8, 3, 4, loader.steps_per_epoch - 1, loader.steps_per_epoch, 0):
        batch, n_targets = batches.get(step)
        assert equal(batch, loader.batch(step)) and n_targets == loader.n_targets(step)


@PROPERTY
@given(LENGTHS, st.integers(2, 64), st.integers(1, 9))
def test_validation_covers_the_split_exactly_once(lengths, sequence_len, rows):
    inputs, targets = stack(val_of(split_of(lengths), sequence_len, rows))
    assert text_targets(targets) == list(range(1, sum(lengths) + 1)) and (inputs[:, 0] == BOS).all()


def test_validation_has_one_order_whatever_its_batch_size_and_a_part_is_its_first_rows():
    inputs, targets = stack(val_of(split_of(), batch_rows=1))
    for batch_rows in (3, 1000):
        batches = list(val_of(split_of(), batch_rows=batch_rows))
        assert {len(inputs) for inputs, _ in batches[:-1]} <= {batch_rows}
        assert equal(stack(batches), (inputs, targets))
    for tokens, rows in ((1, 1), (32, 1), (33, 2), (320, 10), (10**9, None)):
        assert equal(stack(val_of(split_of(), tokens=tokens)), (inputs[:rows], targets[:rows]))


def test_at_most_5_percent_of_the_standard_library_is_wasted(tmp_path):
    corpus = Corpus(DataConfig(max_chars=2_000_000))
    tokenizer = train_tokenizer((text[:10_000] for _, text in islice(corpus, 60)), 1024)
    for _ in write_shards(corpus, tokenizer, tmp_path, source={}, shard_chars=700_000):
        pass
    split = Split(tmp_path, "train", tokenizer)
    loader = Loader(split, sequence_len=256, rows_per_step=16, bos=tokenizer.bos)
    assert max(loader.packing_waste().values()) <= 0.05
    _, targets = epoch_of(loader)
    n_tokens = ((targets != IGNORE) & (targets != tokenizer.bos)).sum().item()
    n_stored = sum(documents.length.sum() for documents in split)
    assert 0.95 * n_stored <= n_tokens <= n_stored
    assert (targets != IGNORE).float().mean() >= 0.95


def test_crop_fills_every_row_with_beginnings_of_documents_and_uses_each_once():
    loader = loader_of(split_of(), packing="crop")
    inputs, targets = epoch_of(loader)
    assert (targets != IGNORE).all() and (inputs[:, 1:] == targets[:, :-1]).all() and (inputs[:, 0] == BOS).all()
    rows = torch.cat((inputs, targets[:, -1:]), dim=1)
    starts = rows[:, 1:][(rows[:, :-1] == BOS) & (rows[:, 1:] != BOS)].tolist()
    documents = (np.concatenate(([0], np.cumsum(SOME_LENGTHS))) + 1)[:-1].tolist()
    assert len(set(starts)) == len(starts) and set(starts) <= set(documents)
    val, _ = stack(val_of(split_of(), packing="crop"))
    assert torch.equal(val[: len(inputs)], inputs)
