"""Shards are fetched whole, checked, kept within bounds, and never trained on when broken."""

import fcntl
import hashlib
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from train.shard_cache import CacheConfig, Shard, ShardCache, ShardError
from train.shard_files import ShardFiles

SIZE = 10_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "remote"
    folder.mkdir()
    for number in range(8):
        data = np.random.default_rng(number).bytes(SIZE)
        (folder / f"train-{number:06d}.tar").write_bytes(data)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> CacheConfig:
    return CacheConfig(
        folder=str(tmp_path / "cache"), size_bytes=4 * SIZE, num_retries=3, backoff_s=0.0
    )


def shards_at(folder: Path, url: str) -> list[Shard]:
    return [
        Shard(
            url=f"{url}/{path.name}",
            size_bytes=SIZE,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.glob("*.tar"))
    ]


def cached(config: CacheConfig) -> set[str]:
    return {path.name for path in Path(config.folder).iterdir()}


def test_bytes_are_the_shards_whether_local_or_remote(folder, config, serve) -> None:
    expected = (folder / "train-000002.tar").read_bytes()[100:600]
    for url in (str(folder), serve(folder).url):
        files = ShardFiles(shards_at(folder, url), config)
        assert files.has_remote == url.startswith("http")
        assert files.read(2, 100, 500) == expected
        files.close()


def test_failed_transfers_are_tried_again(folder, config, serve) -> None:
    server = serve(folder)
    server.faults += ["error", "cut", "error"]
    files = ShardFiles(shards_at(folder, server.url), config)
    assert files.read(0, 0, SIZE) == (folder / "train-000000.tar").read_bytes()
    assert len(server.requests) == 4


def test_transfers_that_keep_failing_stop_the_run(folder, config, serve) -> None:
    server = serve(folder)
    server.faults += ["error", "cut"] * 2
    with pytest.raises(ShardError, match=r"train-000000\.tar: .* after 4 attempts; the run stops"):
        ShardFiles(shards_at(folder, server.url), config).read(0, 0, 1)
    assert cached(config) == set()


def test_a_flipped_byte_is_named_and_the_shard_fetched_once_more(
    folder, config, serve, caplog
) -> None:
    server = serve(folder)
    server.faults += ["flip"]
    files = ShardFiles(shards_at(folder, server.url), config)
    assert files.read(1, 0, SIZE) == (folder / "train-000001.tar").read_bytes()
    assert server.requests == ["train-000001.tar"] * 2
    assert "train-000001.tar: has sha256" in caplog.text


def test_a_shard_that_stays_wrong_stops_the_run(folder, config, serve) -> None:
    server = serve(folder)
    server.faults += ["flip"] * 9
    with pytest.raises(ShardError, match=r"train-000001\.tar: has sha256 .* after 2 attempts"):
        ShardFiles(shards_at(folder, server.url), config).read(1, 0, 1)


def test_a_missing_shard_is_not_tried_again(folder, config, serve) -> None:
    shards = shards_at(folder, serve(folder).url)
    (folder / "train-000003.tar").unlink()
    with pytest.raises(ShardError, match=r"train-000003\.tar is missing; copy"):
        ShardFiles(shards, config).read(3, 0, 1)


def test_broken_local_shards_stop_the_run(folder, config) -> None:
    shards = shards_at(folder, str(folder))
    data = bytearray((folder / "train-000000.tar").read_bytes())
    data[77] ^= 1
    (folder / "train-000000.tar").write_bytes(data)
    (folder / "train-000001.tar").write_bytes(data[:-1])
    (folder / "train-000002.tar").unlink()
    files = ShardFiles(shards, config)
    with pytest.raises(ShardError, match=r"000000\.tar: has sha256 .* where the manifest says"):
        files.read(0, 0, 1)
    with pytest.raises(ShardError, match=r"000001\.tar: has 9999 bytes where .* says 10000; copy"):
        files.read(1, 0, 1)
    with pytest.raises(ShardError, match=r"000002\.tar: No such file or directory; copy"):
        files.read(2, 0, 1)


def test_a_shard_cut_during_the_run_stops_it(folder, config) -> None:
    files = ShardFiles(shards_at(folder, str(folder)), config)
    files.read(0, 0, 1)
    os.truncate(folder / "train-000000.tar", 50)
    with pytest.raises(ShardError, match=r"000000\.tar: ends before byte 70"):
        files.read(0, 30, 40)


def test_a_copy_that_decayed_in_the_cache_is_fetched_again(folder, config, serve, caplog) -> None:
    server = serve(folder)
    shards = shards_at(folder, server.url)
    path = ShardCache(config).fetch(shards[0])
    path.write_bytes(b"x" + path.read_bytes()[1:])
    expected = (folder / "train-000000.tar").read_bytes()
    assert ShardFiles(shards, config).read(0, 0, SIZE) == expected
    assert len(server.requests) == 2
    assert "fetching it again" in caplog.text


def test_runs_share_the_cache(folder, config, serve) -> None:
    server = serve(folder)
    for _ in range(3):
        ShardFiles(shards_at(folder, server.url), config).read(0, 0, 1)
    assert len(server.requests) == 1


def test_the_longest_unused_shards_are_evicted(folder, config, serve) -> None:
    shards, cache = shards_at(folder, serve(folder).url), ShardCache(config)
    for number in (0, 1, 2, 3):
        os.utime(cache.fetch(shards[number]), ns=(number, number))
    cache.fetch(shards[0])  # used again
    cache.fetch(shards[4])
    assert cached(config) == {f"{shards[number].sha256}.tar" for number in (0, 2, 3, 4)}


def test_shards_soon_needed_outlive_others(folder, config, serve) -> None:
    shards, cache = shards_at(folder, serve(folder).url), ShardCache(config)
    for number in (0, 1, 2, 3):
        cache.fetch(shards[number])
    cache.fetch(shards[4], upcoming=shards[:3])
    assert cached(config) == {f"{shards[number].sha256}.tar" for number in (0, 1, 2, 4)}
    # If there is nothing else to evict, one that is needed now takes the place of one of them.
    cache.fetch(shards[5], upcoming=[*shards[:3], shards[4]])
    assert len(cached(config)) == 4
    assert f"{shards[5].sha256}.tar" in cached(config)


def test_the_bound_holds_with_many_readers_at_once(folder, config, serve) -> None:
    """Eight processes read all shards in different orders; a ninth kind of failure is excess."""
    shards = shards_at(folder, serve(folder).url)
    config = CacheConfig(folder=config.folder, size_bytes=10 * SIZE, backoff_s=0.0)
    fork = multiprocessing.get_context("fork")
    excess = fork.Value("i", 0)

    def read_all(seed: int) -> None:
        files = ShardFiles(shards, config)
        for number in np.random.default_rng(seed).permutation(np.repeat(np.arange(8), 3)):
            files.plan([int(number)])
            assert (
                files.read(int(number), 0, SIZE)
                == (folder / f"train-{number:06d}.tar").read_bytes()
            )
            names = cached(config)
            assert not any(name.endswith(".tar") and len(name) != 68 for name in names)
            excess.value = max(excess.value, len(names) - 10)

    processes = [fork.Process(target=read_all, args=(seed,)) for seed in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert excess.value <= 0
    assert not any(name.endswith(".part") for name in cached(config))


def test_shards_are_fetched_ahead_in_order(folder, config, serve) -> None:
    server = serve(folder)
    shards, cache = shards_at(folder, server.url), ShardCache(config)
    wanted = cache.fetch_ahead([shards[number] for number in (5, 1, 6, 2, 7)])
    assert [shard.url[-8:-4] for shard in wanted] == ["0005", "0001", "0006", "0002"]
    # A reader that waits for the last of them finds it on its way, or there.
    cache.fetch(shards[2])
    cache.fetch(shards[5])
    assert server.requests.count("train-000002.tar") == 1


def test_a_shard_needed_now_is_waited_for_while_another_process_fetches_it(
    folder, config, serve
) -> None:
    server = serve(folder)
    shard = shards_at(folder, server.url)[0]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=ShardCache(config).fetch, args=(shard,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.requests == ["train-000000.tar"]


def test_a_kill_leaves_nothing_that_stops_the_next_run(folder, config, serve) -> None:
    server = serve(folder)
    shards = shards_at(folder, server.url)
    cache = Path(config.folder)
    cache.mkdir()
    part = cache / f"{shards[0].sha256}.{SIZE}.part"

    def die_while_fetching() -> None:
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(b"half a shard")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=die_while_fetching)
    process.start()
    process.join()
    assert part.exists()
    # Its room is taken back when others need it …
    for number in (1, 2, 3, 4):
        ShardCache(config).fetch(shards[number])
    assert cached(config) == {f"{shards[number].sha256}.tar" for number in (1, 2, 3, 4)}
    # … and the shard itself can be fetched.
    part.write_bytes(b"half a shard")
    expected = (folder / "train-000000.tar").read_bytes()
    assert ShardFiles(shards, config).read(0, 0, SIZE) == expected


def test_a_cache_too_small_says_so(folder, config, serve) -> None:
    small = CacheConfig(folder=config.folder, size_bytes=SIZE - 1)
    with pytest.raises(ShardError, match=r"9999 bytes do not hold .*; raise cache\.size_bytes"):
        ShardCache(small).fetch(shards_at(folder, serve(folder).url)[0])
