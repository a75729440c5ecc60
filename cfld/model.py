"""CFLD: the one root module that holds S, D, A, P, N and the learnable vector."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from cfld.appearance import AppearanceEncoder
from cfld.attention import set_kernel
from cfld.conditioning import Conditioning, drop_conditions
from cfld.config import PARTS, CFLDConfig
from cfld.objective import (
    TIMESTEPS,
    Losses,
    TrainingBatch,
    build_scheduler,
    kept_conditions,
    noised,
    regression_targets,
    squared_errors,
)
from cfld.pose_adapter import PoseAdapter
from cfld.prompt_decoder import build_prompt_decoder
from cfld.source_encoder import SourceEncoder
from cfld.unet import build_unet, install_processors, prompt_keys_values


@dataclass(frozen=True, kw_only=True)
class ConditioningParts:
    """S, D, A, P and the learnable vector: all but the UNet."""

    source_encoder: SourceEncoder | None
    prompt_decoder: nn.Module
    appearance: AppearanceEncoder | None
    pose_adapter: PoseAdapter
    learnable_vector: nn.Parameter

    @classmethod
    def of(cls, module: nn.Module) -> ConditioningParts:
        """The parts that a module holds under these names."""
        return cls(**{field.name: getattr(module, field.name) for field in fields(cls)})


def build_conditioning_parts(config: CFLDConfig, *, pretrained: bool = True) -> ConditioningParts:
    """S, D, A and P from pretrained weights where the configuration names some."""
    features = config.feature_shape
    has_biases = config.appearance.biases != "nothing"
    has_features = has_biases or config.prompt_decoder.kind != "clip"
    num_tokens = config.prompt_decoder.num_tokens(features.num_tokens)
    parts = ConditioningParts(
        source_encoder=(
            SourceEncoder(config.source_encoder, pretrained=pretrained) if has_features else None
        ),
        prompt_decoder=build_prompt_decoder(config.prompt_decoder, features, pretrained=pretrained),
        appearance=(
            AppearanceEncoder(config.appearance, config.branch_shapes) if has_biases else None
        ),
        pose_adapter=PoseAdapter(
            config.pose_adapter, channels=tuple(config.unet.channels[: config.num_levels])
        ),
        learnable_vector=nn.Parameter(torch.randn(1, num_tokens, config.prompt_decoder.dim)),
    )
    for part in (parts.source_encoder, parts.prompt_decoder, parts.appearance):
        if part is not None:
            set_kernel(part, config.attention)
    return parts


class CFLD(nn.Module):
    """Coarse-to-fine latent diffusion (CFLD Fig. 2); `forward` is the training objective."""

    def __init__(
        self,
        config: CFLDConfig,
        *,
        pretrained: bool = True,
        parts: ConditioningParts | None = None,
        unet: UNet2DConditionModel | None = None,
    ) -> None:
        """Build all parts, from pretrained weights where the configuration names some.

        Without `pretrained` all weights are random and nothing is read or downloaded. `parts` and
        `unet` (with its processors) are taken as they are instead of built.
        """
        super().__init__()
        self.config = config
        self.scheduler = build_scheduler(config.diffusion)
        are_given = parts is not None and unet is not None
        parts = parts or build_conditioning_parts(config, pretrained=pretrained)
        self.source_encoder = parts.source_encoder
        self.prompt_decoder = parts.prompt_decoder
        self.appearance = parts.appearance
        self.pose_adapter = parts.pose_adapter
        if unet is None:
            unet = build_unet(
                config.unet,
                latent_channels=config.codec.latent_channels,
                prompt_dim=config.prompt_decoder.dim,
                latent_size=config.latent_size,
                pretrained=pretrained,
            )
            install_processors(unet, attention=config.attention, biases=config.appearance.biases)
        self.unet = unet
        self.learnable_vector = parts.learnable_vector
        if not are_given:
            self.set_gradient_checkpointing(config.gradient_checkpointing)

    def set_gradient_checkpointing(self, parts: Collection[str]) -> None:
        """Recompute the activations of these parts, and of no others, in the backward."""
        for name in PARTS:
            part, is_wanted = getattr(self, name), name in parts
            if name == "unet" and is_wanted:
                part.enable_gradient_checkpointing()
            elif name == "unet":
                part.disable_gradient_checkpointing()
            elif name == "source_encoder" and part is not None:
                part.swin.set_grad_checkpointing(is_wanted)
            elif hasattr(part, "recompute"):
                part.recompute = is_wanted

    def condition(
        self,
        source: Float[Tensor, "batch 3 source_height source_width"],
        pose_map: Float[Tensor, "rows 21 pose_height pose_width"],
    ) -> Conditioning:
        """All that the UNet needs to know of the source images and the poses, for all steps.

        `source` lies in [-1, 1], `pose_map` in [0, 1]. There may be several poses per source:
        first one for every source, then another for every source, and so on.

        Raises:
            ValueError: If a size differs from the configuration's, or the poses are not a
                multiple of the sources.
        """
        return self.add_pose(self.encode_source(source), pose_map)

    def encode_source(
        self, source: Float[Tensor, "batch 3 source_height source_width"]
    ) -> Conditioning:
        """The appearance, coarse and fine, without a pose."""
        source = source.to(self.learnable_vector.dtype)
        features = () if self.source_encoder is None else self.source_encoder(source)
        return Conditioning(
            prompt=self.prompt_decoder(source, features),
            appearance_biases=() if self.appearance is None else self.appearance(features),
            pose_residuals=(),
        )

    def add_pose(
        self,
        appearance: Conditioning,
        pose_map: Float[Tensor, "rows 21 pose_height pose_width"],
    ) -> Conditioning:
        """Complete what `encode_source` gives; rows as in `condition`."""
        self._check_size("pose map", pose_map, self.config.pose_map_size)
        times, rest = divmod(len(pose_map), len(appearance.prompt))
        if rest or not times:
            raise ValueError(
                f"{len(pose_map)} pose maps for {len(appearance.prompt)} source images: give one "
                "or several for each"
            )
        residuals = self.pose_adapter(pose_map.to(self.learnable_vector.dtype))
        return replace(appearance.tile(times), pose_residuals=residuals)

    def precompute_keys_values(self, conditioning: Conditioning) -> Conditioning:
        """Add the prompt's keys and values, which are the same at every sampling step."""
        keys_values = prompt_keys_values(
            self.unet, conditioning.prompt, conditioning.appearance_biases
        )
        return replace(conditioning, prompt_keys_values=keys_values)

    def predict(
        self,
        noisy_latents: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, " batch"] | Int[Tensor, ""] | Float[Tensor, ""],
        conditioning: Conditioning,
    ) -> Float[Tensor, "batch channels height width"]:
        """The UNet's prediction, epsilon_theta(z_t, t, x_s, x_p).

        Some of diffusers' schedulers have timesteps between the whole ones.

        Raises:
            ValueError: If the latents have another size than the configuration's.
        """
        self._check_size("latents", noisy_latents, self.config.latent_size)
        return self.unet(
            noisy_latents.to(self.unet.dtype),
            timesteps,
            encoder_hidden_states=conditioning.prompt,
            # A new list each time, because the UNet empties it.
            down_intrablock_additional_residuals=list(conditioning.pose_residuals),
            cross_attention_kwargs={
                "appearance_biases": conditioning.appearance_biases,
                "prompt_keys_values": conditioning.prompt_keys_values,
            },
            return_dict=False,
        )[0]

    def forward(self, batch: TrainingBatch) -> Losses:
        """Denoise both rows of each pair (CFLD Eq. 3, 5 and 6); S, D and A run once per pair."""
        settings, draws = self.config.diffusion, batch.draws
        timesteps = TIMESTEPS[settings.timesteps](draws.timesteps, settings.num_steps)
        conditioning = drop_conditions(
            self.condition(batch.source, batch.pose_maps),
            self.learnable_vector,
            kept_conditions(settings, draws.dropout),
        )
        noisy_latents = noised(self.scheduler, batch.latents, draws.noise, timesteps)
        return squared_errors(
            self.predict(noisy_latents, timesteps, conditioning),
            regression_targets(self.scheduler, batch.latents, draws.noise, timesteps),
        )

    @staticmethod
    def _check_size(name: str, tensor: Tensor, wanted: tuple[int, int]) -> None:
        if tuple(tensor.shape[-2:]) != wanted:
            raise ValueError(
                f"{name} of {tuple(tensor.shape[-2:])} do not fit: the configuration wants "
                f"{wanted} (height, width), which follows from source_encoder.image_size"
            )
