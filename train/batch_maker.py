"""From the loader's batch to the model's: floats on the device, pose maps, latents, draws."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from cfld.codec import Codec, VaeCodec
from cfld.config import CFLDConfig
from cfld.images import to_floats
from cfld.objective import Draws, TrainingBatch
from cfld.pose import make_pose_maps
from train.batch import Batch
from train.loader import Loader
from train.randomness import Stream, noise_for, uniforms_for


class BatchMaker:
    """Makes training batches on a device; equal for equal (seed, draws), whatever the ranks."""

    def __init__(
        self,
        config: CFLDConfig,
        codec: Codec,
        *,
        seed: int,
        device: torch.device,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._source_size = config.source_encoder.image_size
        self._latent_shape = (config.codec.latent_channels, *config.latent_size)
        self._codec = codec
        self._seed = seed
        self._device = device
        self._memory_format = memory_format

    def make(self, batch: Batch) -> TrainingBatch:
        """Return the model's view of a batch: rows to the source poses, then to the targets'."""
        batch = batch.to(self._device)
        places = torch.cat([batch.source, batch.target])
        pose_maps = make_pose_maps(batch.skeletons(), batch.points)
        return TrainingBatch(
            source=self._format(to_floats(batch.source_images(self._source_size))),
            pose_maps=self._format(pose_maps[places]),
            latents=self._format(self._latents(batch, places)),
            draws=self._draws(batch.draws),
        )

    def _latents(
        self, batch: Batch, places: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows channels height width"]:
        moments = batch.latents
        if moments is None:
            moments = self._codec.moments(to_floats(batch.images))
        noise = None
        if isinstance(self._codec, VaeCodec):  # the other codec has no use for it
            noise = self._noise(batch.draws, Stream.POSTERIOR)
        return self._codec.sample(moments[places], noise=noise)

    def _draws(self, draws: Int[Tensor, " pairs"]) -> Draws:
        timesteps, dropout = (
            rearrange(uniforms_for(draws, 2, seed=self._seed, stream=stream), "b two -> (two b)")
            for stream in (Stream.TIMESTEP, Stream.DROPOUT)
        )
        noise = self._format(self._noise(draws, Stream.NOISE))
        return Draws(noise=noise, timesteps=timesteps, dropout=dropout)

    def _noise(
        self, draws: Int[Tensor, " pairs"], stream: Stream
    ) -> Float[Tensor, "rows channels height width"]:
        noise = noise_for(draws, (2, *self._latent_shape), seed=self._seed, stream=stream)
        return rearrange(noise, "b two c h w -> (two b) c h w")

    def _format(self, tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return tensor.contiguous(memory_format=self._memory_format)


def check_latents(loader: Loader, config: CFLDConfig, codec: Codec) -> None:
    """Refuse stored latents that the run's own codec would not have made.

    Raises:
        ValueError: If their shape is another, or a set names another VAE.
    """
    if loader.latent_shape is None:
        return
    without = "encode images in every step: '--set loader.use_latents=false'"
    expected = (2 * config.codec.latent_channels, *config.latent_size)
    if loader.latent_shape != expected:
        fitting = (
            f"build the shards with --image-size {config.image_size[0]} {config.image_size[1]} and "
            "--latents of the model's VAE, or "
        )
        raise ValueError(
            f"stored latents have the shape {list(loader.latent_shape)}, the model needs "
            f"{list(expected)}; {fitting if isinstance(codec, VaeCodec) else ''}{without}"
        )
    if not isinstance(codec, VaeCodec):
        return
    sha256 = codec.hash_encoder()
    for identity, latents in zip(loader.table.identities, loader.table.latents_of, strict=True):
        if latents and latents["sha256"] != sha256:
            raise ValueError(
                f"the stored latents of {identity.dataset} are of the VAE {latents['vae']}, whose "
                f"weights are not those of model.codec.pretrained, {config.codec.pretrained}; use "
                f"one VAE for both, or {without}"
            )
