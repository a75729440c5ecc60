"""From the loader's batches to the model's: equal for equal draws, and what inference sees."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from cfld.codec import CodecConfig, build_codec
from cfld.config import PRESETS
from cfld.pipeline_inputs import read_sources
from cfld.pose import draw_pose_map
from tests.train.conftest import write_shards
from train.batch_maker import BatchMaker
from train.loader import Loader, LoaderConfig
from train.order import OrderConfig, pairs_of
from train.pair_table import SetConfig, read_pairs
from train.randomness import Stream, noise_for, uniforms_for
from train.step import seed_layers

TINY = PRESETS["tiny"]
VAE = replace(
    TINY,
    codec=CodecConfig(kind="vae", factor=4, channels=(8, 8, 8), num_groups=4, pretrained=None),
)


def make_loader(folder, micro_batch: int, rank: int = 0, num_ranks: int = 1) -> Loader:
    config = LoaderConfig(num_workers=0, flip_source=0.0)
    return Loader(
        read_pairs([SetConfig(url=str(folder))]), OrderConfig(global_batch=12), config,
        micro_batch=micro_batch, rank=rank, num_ranks=num_ranks,
        image_size=(64, 64), pose_map_size=(64, 64),
    )  # fmt: skip


def make_maker(config) -> BatchMaker:
    torch.manual_seed(0)
    return BatchMaker(config, build_codec(config.codec), seed=5, device=torch.device("cpu"))


def rows_of_pairs(batch) -> torch.Tensor:
    """What the model sees of each pair, a row per pair."""
    rows = [batch.pose_maps, batch.latents, batch.draws.noise]
    numbers = [batch.draws.timesteps, batch.draws.dropout]
    both = [each.flatten(1) for each in rows] + [each[:, None] for each in numbers]
    joined = torch.cat(both, dim=1)
    half = len(joined) // 2
    return torch.cat([batch.source.flatten(1), joined[:half], joined[half:]], dim=1)


def test_a_batch_is_what_the_pipeline_would_see(shard_set) -> None:
    loader = make_loader(shard_set, 12)
    batch = next(iter(loader))
    made = make_maker(TINY).make(batch)
    table = loader.table
    pairs = pairs_of(batch.draws.numpy(), table.sets)
    images = batch.images.numpy()
    source = read_sources([images[place] for place in batch.source], (64, 64))
    torch.testing.assert_close(made.source, source)
    for number, pair in enumerate(pairs):
        for row, index in ((number, table.source[pair]), (number + 12, table.target[pair])):
            frame = tuple(table.frame[index].tolist())
            drawn = draw_pose_map(table.keypoints[index], frame, (64, 64))
            torch.testing.assert_close(made.pose_maps[row], drawn)
    targets = read_sources([images[place] for place in batch.target], (64, 64))
    decoded = build_codec(TINY.codec).decode(made.latents)
    torch.testing.assert_close(decoded, torch.cat([source, targets]))


def test_draws_are_keyed_and_source_rows_come_first(shard_set) -> None:
    batch = next(iter(make_loader(shard_set, 12)))
    draws = make_maker(TINY).make(batch).draws
    noise = noise_for(batch.draws, (2, 48, 16, 16), seed=5)
    torch.testing.assert_close(draws.noise, torch.cat([noise[:, 0], noise[:, 1]]))
    uniforms = uniforms_for(batch.draws, 2, seed=5, stream=Stream.TIMESTEP)
    torch.testing.assert_close(draws.timesteps, torch.cat([uniforms[:, 0], uniforms[:, 1]]))


@pytest.mark.parametrize("config", [TINY, VAE], ids=["pixels", "vae"])
@pytest.mark.parametrize("latent_shape", [None, "stored"])
def test_pairs_are_the_same_in_any_batch(tmp_path, config, latent_shape) -> None:
    channels = 2 * config.codec.latent_channels
    shape = (channels, 16, 16) if latent_shape else None
    folder = write_shards(tmp_path / "set", latent_shape=shape)
    maker = make_maker(config)
    whole = rows_of_pairs(maker.make(next(iter(make_loader(folder, 12)))))
    parts = [
        rows_of_pairs(maker.make(batch))
        for rank in (0, 1)
        for batch in itertools.islice(make_loader(folder, 3, rank, 2), 2)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)


def test_channels_last_changes_the_layout_alone(shard_set) -> None:
    batch = next(iter(make_loader(shard_set, 12)))
    maker = BatchMaker(
        TINY,
        build_codec(TINY.codec),
        seed=5,
        device=torch.device("cpu"),
        memory_format=torch.channels_last,
    )
    made = maker.make(batch)
    assert made.latents.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(rows_of_pairs(made), rows_of_pairs(make_maker(TINY).make(batch)))


def test_layers_draw_the_same_for_the_same_batch(shard_set) -> None:
    batches = list(itertools.islice(make_loader(shard_set, 6), 2))
    drawn = []
    for batch in (*batches, batches[0]):
        seed_layers(5, batch)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[2])
    assert not np.allclose(drawn[0], drawn[1])
