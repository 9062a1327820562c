"""Two processes of one torch.distributed group make each thing once, together, and agree on it."""

import functools
import multiprocessing
import os
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

from smolvlm_exp.engine.disk_cache import DiskCache
from smolvlm_exp.engine.inputs.dataset import PackedDataset
from smolvlm_exp.engine.inputs.tiles import pixels
from smolvlm_exp.engine.precompute.features import keep_features
from smolvlm_exp.engine.precompute.reference import reference_logps
from smolvlm_exp.models.model import load_model
from smolvlm_exp.utils.distributed import all_ranks, broadcast_from_rank0, gather, rank_slice
from tests.conftest import compose
from tests.engine.inputs.test_dataset import PLENTY, RAM
from tests.engine.precompute.test_reference import PARTS, Count, lengths


def member(rank, folder, work):
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    try:
        work(rank, folder)
    finally:
        dist.destroy_process_group()


def run_on_two_ranks(folder, work):
    """Run `work(rank, folder)` in two processes; their exit codes."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=member, args=(rank, folder, work)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def test_rank_slices_cover_everything_once():
    for count in range(7):
        for processes in range(1, 5):
            shares = [list(rank_slice(count, rank, processes)) for rank in range(processes)]
            assert list(chain(*shares)) == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_single_process_needs_no_group():
    assert (broadcast_from_rank0(lambda: 3), gather(4), all_ranks(True), all_ranks(False)) == (3, [4], True, False)


def agree(rank, folder):
    assert broadcast_from_rank0(lambda: f"from {rank}") == "from 0"
    assert gather(rank) == [0, 1]
    assert all_ranks(True)
    assert not all_ranks(rank == 0)
    with pytest.raises((KeyError, RuntimeError), match="lost"):
        broadcast_from_rank0(lambda: {}["lost"])


def test_two_ranks_agree(tmp_path):
    assert run_on_two_ranks(tmp_path, agree) == [0, 0]


def keep_both(rows, processor, rank, folder):
    """Tiles and features of the same images; each process notes which it made."""
    made = []
    fed = PackedDataset(rows, processor)
    tile_batches = fed.tile_batches

    def noted(images, num_proc):
        made.extend(images)
        return tile_batches(images, num_proc)

    fed.tile_batches = noted
    store = DiskCache(folder / "cache", PLENTY, PLENTY)
    fed.cache_tiles(store, 0)
    assert sorted(chain(*gather(list(made)))) == list(range(len(fed.image_hashes)))
    made.clear()
    model = get_peft_model(load_model(compose().model), LoraConfig(target_modules=r".*text_model.*q_proj"))
    keep_features(fed, model, pixels(processor), store, 0)
    assert sorted(chain(*gather(list(made)))) == list(range(len(fed.image_hashes)))
    assert 0 < len(made) < len(fed.image_hashes)
    torch.save([fed[i]["features"] for i in range(len(fed))], folder / f"features{rank}.pt")
    assert all(torch.equal(fed.tiles(n), PackedDataset(rows, processor).tiles(n)) for n in range(len(fed.image_hashes)))


def test_tiles_and_features_are_divided_among_ranks(processor, rows, tmp_path):
    few = rows.train.select(range(9))
    assert run_on_two_ranks(tmp_path, functools.partial(keep_both, few, processor)) == [0, 0]
    alone = PackedDataset(few, processor)
    keep_features(alone, load_model(compose().model).requires_grad_(False), pixels(processor), RAM, 0)
    for rank in range(2):
        for i, features in enumerate(torch.load(tmp_path / f"features{rank}.pt")):
            torch.testing.assert_close(features, alone[i]["features"], rtol=0, atol=1e-5)


def score_both(rows, processor, with_store, rank, folder):
    feed, score = PackedDataset(rows, processor), Count()
    store = DiskCache(folder / "cache", PLENTY if with_store else 0)
    found = reference_logps(feed, score, PARTS, store, 4, 0)
    assert tuple(logps.tolist() for logps in found) == lengths(feed)
    assert sorted(chain(*gather(score.rows))) == list(range(len(rows)))
    assert 0 < len(score.rows) < len(rows)
    if with_store:
        again = reference_logps(feed, pytest.fail, PARTS, store, 4, 0)
        assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("with_store", [True, False])
def test_reference_rows_are_divided_among_ranks(processor, rows, tmp_path, with_store):
    work = functools.partial(score_both, rows.train.select(range(14)), processor, with_store)
    assert run_on_two_ranks(tmp_path, work) == [0, 0]


def fail_on_one_rank(rank, folder):
    """Every rank raises, and no file is left."""

    def fill(tensors):
        if rank == 1:
            raise KeyError("its share")

    store = DiskCache(folder / "cache", PLENTY)
    with pytest.raises((KeyError, RuntimeError), match=r"its share|share of thing-1"):
        store.get("thing-1", {"bytes": (torch.uint8, (7,))}, fill)
    assert all_ranks(not list(store.folder.glob("*thing-1")))
    assert DiskCache(folder / "small", 3).get("thing-1", {"bytes": (torch.uint8, (7,))}, fill) is None


def test_a_failure_on_one_rank_stops_both(tmp_path):
    assert run_on_two_ranks(tmp_path, fail_on_one_rank) == [0, 0]
