"""Batches are the same however many ranks and workers make them, resume anywhere, and are right."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from cfld.images import decode_image, resize_image
from cfld.pose import canvas_points, draw_skeleton
from shards.format import FormatError, open_shards
from tests.train.conftest import write_shards
from tests.train.nginx import has_nginx, slow_server
from train.batch import Batch
from train.loader import Loader, LoaderConfig, load_pairs
from train.order import OrderConfig, epoch_order
from train.pair_table import SetConfig, read_pairs
from train.randomness import Stream, uniforms_for
from train.shard_cache import CacheConfig, ShardError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

ORDER = OrderConfig(global_batch=24, seed=3, block_shards=2)  # 3 steps an epoch
SIZE = (32, 24)


def make_loader(folder: Path | str, *, order: OrderConfig = ORDER, micro_batch: int = 24,
                image_size: tuple[int, int] = SIZE, rank: int = 0, num_ranks: int = 1,
                **config) -> Loader:  # fmt: skip
    settings = LoaderConfig(**{"num_workers": 0} | config)
    return Loader(read_pairs([SetConfig(url=str(folder))]), order, settings, image_size=image_size,
                  micro_batch=micro_batch, rank=rank, num_ranks=num_ranks)  # fmt: skip


def take(loader: Loader, num: int) -> list[Batch]:
    return list(itertools.islice(loader, num))


def contents(batches: list[Batch]) -> list[tuple[int, int, int, str]]:
    """Epoch, step and draw of each pair, and a hash of all that the trainer gets of it."""
    found = []
    for batch in batches:
        conditions, skeletons = batch.source_images((16, 12)), batch.skeletons()
        for number, (draw, s, t) in enumerate(
            zip(batch.draws, batch.source, batch.target, strict=True)
        ):
            parts = [conditions[number], skeletons[s], skeletons[t], batch.points[s],
                     batch.points[t], batch.images[s], batch.images[t]]  # fmt: skip
            pixels = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts))
            found.append((batch.epoch, batch.step, int(draw), pixels.hexdigest()))
    return found


def global_batches(folder: Path | str, num_ranks: int, num_workers: int, accumulation: int,
                   **config) -> list[tuple[int, int, int, str]]:  # fmt: skip
    """What all ranks together see in four steps, in the order of the global batches."""
    found = []
    for rank in range(num_ranks):
        loader = make_loader(folder, micro_batch=24 // num_ranks // accumulation, rank=rank,
                             num_ranks=num_ranks, num_workers=num_workers, **config)  # fmt: skip
        assert loader.accumulation == accumulation
        found.append(contents(take(loader, 4 * accumulation)))
    by_step = [[list(step) for _, step in itertools.groupby(rank, key=lambda pair: pair[:2])]
               for rank in found]  # fmt: skip
    return [pair for step in range(4) for rank in by_step for pair in rank[step]]


def bytes_in(folder: Path) -> int:
    """Size of all files, some of which may vanish or get another name meanwhile."""
    num_bytes = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            num_bytes += path.stat().st_size
    return num_bytes


@pytest.fixture(scope="module")
def expected(shard_set: Path) -> list[tuple[int, int, int, str]]:
    return global_batches(shard_set, 1, 0, 1)


def test_batches_follow_the_order(shard_set, expected) -> None:
    sets = read_pairs([SetConfig(url=str(shard_set))]).sets
    orders = np.concatenate([epoch_order(sets, ORDER, epoch) for epoch in (0, 1)])[:4]
    assert [pair[2] for pair in expected] == orders.reshape(-1).tolist()
    assert [pair[:2] for pair in expected[::24]] == [(0, 0), (0, 1), (0, 2), (1, 0)]


@pytest.mark.parametrize(
    ("num_ranks", "num_workers", "accumulation"),
    [(1, 2, 1), (2, 1, 3), (3, 2, 4), (4, 0, 2), (6, 1, 1), (8, 0, 3), (1, 8, 4)],
)
def test_ranks_workers_and_micro_batches_change_nothing(
    shard_set, expected, num_ranks, num_workers, accumulation
) -> None:
    assert global_batches(shard_set, num_ranks, num_workers, accumulation) == expected


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("num_workers", [0, 1, 2, 4, 8])
def test_any_ranks_and_workers_change_nothing(shard_set, expected, num_ranks, num_workers) -> None:
    assert global_batches(shard_set, num_ranks, num_workers, 1) == expected


def test_each_pair_once_per_epoch(shard_set) -> None:
    draws = torch.cat([batch.draws for batch in take(make_loader(shard_set, num_workers=2), 18)])
    for epoch in (0, 1, 5):
        pairs = draws.view(6, 72)[epoch] % 72
        assert sorted(pairs.tolist()) == list(range(72))


@pytest.mark.parametrize("step", [0, 1, 3, 7])
def test_resume_continues_with_the_next_batch(shard_set, step: int) -> None:
    """At any step, with other ranks, workers and micro-batches than before."""
    unbroken = make_loader(shard_set, micro_batch=12)
    rest = contents(take(unbroken, 2 * (step + 3)))[step * 24 :]
    broken = make_loader(shard_set, micro_batch=8, num_workers=1)
    take(broken, 3 * step)
    state = json.loads(json.dumps(broken.state_dict()))
    assert (state["epoch"], state["step"]) == divmod(step, 3)
    resumed = make_loader(shard_set, micro_batch=4, num_workers=0)
    resumed.load_state_dict(state)
    assert contents(take(resumed, 18)) == rest


def test_resume_in_the_middle_of_a_step_repeats_it(shard_set) -> None:
    loader = make_loader(shard_set, micro_batch=8)
    first = contents(take(loader, 4))
    assert contents(take(loader, 1)) == first[24:]


def test_resume_far_into_a_run_computes_two_epochs_at_most(shard_set) -> None:
    loader = make_loader(shard_set)
    loader.load_state_dict(loader.state_dict() | {"epoch": 10**6, "step": 2})
    assert take(loader, 1)[0].epoch == 10**6
    assert loader._epoch.cache_info().misses <= 2


def test_state_of_another_order_is_refused(shard_set, latent_set) -> None:
    state = make_loader(shard_set).state_dict()
    cases = [
        (make_loader(shard_set, order=replace(ORDER, seed=4)), r"order\.seed: 3, now 4;? ?"),
        (make_loader(shard_set, order=replace(ORDER, global_batch=48), micro_batch=48),
         r"order\.global_batch: 24, now 48"),
        (make_loader(latent_set), "shard set 0: manifest_sha256 '"),
    ]  # fmt: skip
    for loader, message in cases:
        with pytest.raises(ValueError, match=f"cannot be continued: {message}.*begin a new run"):
            loader.load_state_dict(state)
    with pytest.raises(ValueError, match="2 shard sets, now 1"):
        make_loader(shard_set).load_state_dict(state | {"sets": state["sets"] * 2})


def test_moved_shards_resume(shard_set, tmp_path) -> None:
    state = make_loader(shard_set).state_dict()
    (tmp_path / "moved").symlink_to(shard_set)
    make_loader(tmp_path / "moved").load_state_dict(state)


def test_samples_are_those_of_the_shards(shard_set) -> None:
    shards = open_shards(str(shard_set))
    rows = {row["key"]: row for row in shards.read_index().to_pylist()}
    loader = make_loader(shard_set, image_size=(40, 40))
    (batch,) = take(loader, 1)
    assert len(batch.images) == len({key for p in loader.pair_keys(batch.draws) for key in p})
    flipped = 0
    for number, keys in enumerate(loader.pair_keys(batch.draws)):
        for key, sample in zip(keys, (batch.source[number], batch.target[number]), strict=True):
            row = rows[key]
            image = resize_image(decode_image(shards.read_member(row, "image")), (40, 40))
            np.testing.assert_array_equal(batch.images[sample], image)
            keypoints = np.array(row["keypoints"], np.float32).reshape(18, 3)
            np.testing.assert_array_equal(batch.points[sample], canvas_points(keypoints, SIZE))
            drawn = draw_skeleton(keypoints, SIZE)
            np.testing.assert_array_equal(batch.skeletons()[sample], drawn)
            np.testing.assert_array_equal(decode_image(shards.read_member(row, "pose")), drawn)
        condition = resize_image(batch.images[batch.source[number]].numpy(), (20, 20))
        if batch.flips[number]:
            condition = condition[:, ::-1]
            flipped += 1
        np.testing.assert_array_equal(batch.source_images((20, 20))[number], condition)
    assert 0 < flipped < 24


def test_flips_are_keyed_and_can_be_switched_off(shard_set) -> None:
    (batch,) = take(make_loader(shard_set), 1)
    uniforms = uniforms_for(batch.draws, 1, seed=ORDER.seed, stream=Stream.FLIP)[:, 0]
    assert torch.equal(batch.flips, uniforms < 0.5)
    (never,) = take(make_loader(shard_set, flip_source=0.0), 1)
    assert not never.flips.any()


def test_latents_replace_target_images(latent_set) -> None:
    shards = open_shards(str(latent_set))
    rows = {row["key"]: row for row in shards.read_index().to_pylist()}
    for num_workers in (0, 1):
        loader = make_loader(latent_set, micro_batch=6, num_workers=num_workers)
        assert loader.has_latents
        (batch,) = take(loader, 1)
        assert len(batch.images) == batch.num_sources < len(batch.latents) == len(batch.points)
        for number, keys in enumerate(loader.pair_keys(batch.draws)):
            for key, sample in zip(keys, (batch.source[number], batch.target[number]), strict=True):
                data = shards.read_member(rows[key], "latent")
                latent = np.frombuffer(data[-8 * 4 * 4 * 2 :], np.float16).reshape(8, 4, 4)
                np.testing.assert_array_equal(batch.latents[sample], latent)
            source = decode_image(shards.read_member(rows[keys[0]], "image"))
            np.testing.assert_array_equal(batch.images[batch.source[number]], source)
    loader = make_loader(latent_set, use_latents=False)
    assert take(loader, 1)[0].latents is None


def test_latents_that_only_some_sets_have_are_not_used(shard_set, latent_set, caplog) -> None:
    table = read_pairs([SetConfig(url=str(shard_set)), SetConfig(url=str(latent_set))])
    loader = Loader(table, ORDER, LoaderConfig(num_workers=0), micro_batch=24, image_size=SIZE)
    assert not loader.has_latents
    assert "stored latents are not used: not all images" in caplog.text


def test_sets_are_mixed_by_weight(shard_set, tmp_path) -> None:
    other = write_shards(tmp_path / "other", persons=4, seed=5, image_format="png", size=(20, 16))
    configs = [SetConfig(url=str(shard_set)), SetConfig(url=str(other), weight=2.0)]
    table = read_pairs(configs)
    loader = Loader(table, ORDER, LoaderConfig(num_workers=1), micro_batch=24, image_size=SIZE)
    assert loader.steps_per_epoch == (72 + 2 * 24) // 24
    keys = [pair for batch in take(loader, 5) for pair in loader.pair_keys(batch.draws)]
    counts = {pair: keys.count(pair) for pair in keys}
    assert sorted(counts.values()) == [1] * 72 + [2] * 24
    assert all(pair[0].startswith("s5") for pair, count in counts.items() if count == 2)


def test_dropped_and_filled_batches_are_said(shard_set, caplog) -> None:
    caplog.set_level(logging.INFO)
    order = replace(ORDER, global_batch=20)
    make_loader(shard_set, order=order, micro_batch=20)
    assert "the last 12 pairs of each epoch are dropped" in caplog.text
    loader = make_loader(shard_set, order=replace(order, fill_last=True), micro_batch=20)
    assert "8 pairs of each epoch come twice" in caplog.text
    assert loader.steps_per_epoch == 4


def test_validation_pairs_of_any_size_load(tmp_path) -> None:
    folder = write_shards(tmp_path / "test", persons=2, size=(51, 37), split="test")
    table = read_pairs([SetConfig(url=str(folder), split="test")])
    batch = load_pairs(table, [3, 0], CacheConfig(), image_size=SIZE)
    assert batch.draws.tolist() == [3, 0]
    assert batch.images.shape[1:] == (*SIZE, 3)
    assert not batch.flips.any()


def test_batches_stay_as_they_are_while_later_ones_come(shard_set) -> None:
    loader = make_loader(shard_set, micro_batch=12, num_workers=2)
    seen = []
    for batch in itertools.islice(loader, 12):
        seen.append((batch, contents([batch])))
    assert all(contents([batch]) == content for batch, content in seen)


def test_the_trainers_random_state_is_left_alone(shard_set) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(make_loader(shard_set, num_workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow  # counts processes, which a crowded machine is slow to end
def test_workers_end_with_the_iteration(shard_set) -> None:
    batches = iter(make_loader(shard_set, num_workers=2))
    next(batches)
    workers = psutil.Process().children()
    assert len(workers) >= 2
    del batches
    psutil.wait_procs(workers, timeout=30)
    assert not any(worker.is_running() for worker in workers)


def test_workers_outlive_sigterm_but_not_the_trainer(shard_set) -> None:
    """A preempted trainer finishes its step although its workers get the signal too."""
    script = f"""
import os, signal, psutil
from train.loader import Loader, LoaderConfig
from train.order import OrderConfig
from train.pair_table import SetConfig, read_pairs

table = read_pairs([SetConfig(url={str(shard_set)!r})])
config = LoaderConfig(num_workers=2)
order = OrderConfig(global_batch=24)
batches = iter(Loader(table, order, config, micro_batch=24, image_size=(32, 24)))
next(batches)
workers = psutil.Process().children()
for worker in workers:
    os.kill(worker.pid, signal.SIGTERM)
for _ in range(20):
    next(batches)
assert len(psutil.Process().children()) == 2
raise SystemExit(7)  # while `batches` lives on in the globals
"""
    result = subprocess.run([sys.executable, "-c", script], timeout=120, check=False)
    assert result.returncode == 7


@pytest.mark.slow
def test_a_killed_worker_ends_the_run(shard_set) -> None:
    batches = iter(make_loader(shard_set, num_workers=1))
    next(batches)
    (worker,) = psutil.Process().children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        take(batches, 9)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_shards_stop_the_run(tmp_path, num_workers) -> None:
    folder = write_shards(tmp_path / "set", persons=4, persons_per_shard=4)
    tar = folder / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[2000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ShardError, match=r"train-000000\.tar: has sha256 .* copy it again"):
        take(make_loader(folder, num_workers=num_workers), 1)


def test_undecodable_members_stop_the_run(tmp_path) -> None:
    """Their hash is right, so they were written like this."""
    folder = write_shards(tmp_path / "set", persons=4, persons_per_shard=4, latent_shape=(8, 4, 4))
    table = read_pairs([SetConfig(url=str(folder))])
    config = LoaderConfig(num_workers=0)
    short = replace(table, image=replace(table.image, size=table.image.size // 2))
    with pytest.raises(ShardError, match=r"image s0p000\dv\d in .*tar cannot be decoded: trunc"):
        take(Loader(short, ORDER, config, micro_batch=24, image_size=SIZE), 1)
    sizes = table.latent.size.copy()
    sizes[1:] -= 2
    short = replace(table, latent=replace(table.latent, size=sizes))
    with pytest.raises(ShardError, match=r"latent of .* is not float16 of shape \[8, 4, 4\]"):
        take(Loader(short, ORDER, config, micro_batch=24, image_size=SIZE), 1)


def test_latents_of_another_kind_are_refused(tmp_path) -> None:
    folder = write_shards(tmp_path / "set", persons=4, latent_shape=(8, 4))
    with pytest.raises(ShardError, match=r"is float16 of shape \[8, 4\], not float16 of shape \["):
        make_loader(folder)


def test_a_split_without_pairs_is_refused(shard_set) -> None:
    with pytest.raises(FormatError, match="no pairs in split 'test'; it has 72 in 'train'"):
        read_pairs([SetConfig(url=str(shard_set), split="test")])


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"flip_source is 1\.5, it must lie in"):
        LoaderConfig(flip_source=1.5)
    with pytest.raises(ValueError, match="num_workers must be 0 or more"):
        LoaderConfig(num_workers=-1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_remote_shards_give_the_same_in_a_bounded_cache(
    shard_set, expected, serve, tmp_path, num_workers
) -> None:
    server = serve(shard_set)
    server.faults += ["ok", "error", "flip", "cut"]
    largest = max(path.stat().st_size for path in shard_set.glob("*.tar"))
    bound = 5 * largest  # of 6 shards
    cache = CacheConfig(
        folder=str(tmp_path / "cache"), size_bytes=bound, backoff_s=0.0, lookahead_steps=1
    )
    loader = make_loader(server.url, num_workers=num_workers, cache=cache)
    found = []
    for batch in itertools.islice(loader, 4):
        found += contents([batch])
        assert bytes_in(tmp_path / "cache") <= bound
    assert found == expected


def test_a_cache_smaller_than_two_blocks_is_refused(shard_set, serve, tmp_path) -> None:
    cache = CacheConfig(folder=str(tmp_path), size_bytes=10_000)
    with pytest.raises(ValueError, match=r"cache\.size_bytes is 10000, but two blocks of 2 shards"):
        make_loader(serve(shard_set).url, cache=cache)


@pytest.mark.slow
@pytest.mark.skipif(not has_nginx(), reason="needs nginx (apt-get install nginx-light)")
def test_nginx_far_away_gives_the_same_in_a_bounded_cache(tmp_path) -> None:
    """50 ms away, one connection in seven breaks; four workers share a cache of half the set."""
    folder = write_shards(tmp_path / "set", persons=96, persons_per_shard=4, size=(128, 96))
    expected = global_batches(folder, 1, 0, 1)
    bound = sum(path.stat().st_size for path in folder.glob("*.tar")) // 2
    cache = CacheConfig(
        folder=str(tmp_path / "cache"), size_bytes=bound, backoff_s=0.05, lookahead_steps=4
    )
    with slow_server(folder, tmp_path / "nginx", latency_s=0.05, cut_every=7) as url:
        assert global_batches(url, 2, 2, 2, cache=cache) == expected
        loader = make_loader(url, num_workers=4, micro_batch=12, cache=cache)
        draws = []
        for batch in itertools.islice(loader, 2 * loader.steps_per_epoch):
            draws += batch.draws.tolist()
            assert bytes_in(tmp_path / "cache") <= bound
    assert draws == epoch_order(loader.table.sets, ORDER, 0).reshape(-1).tolist()
