"""What diffusers cannot save by itself, as components that it can: S, D, A, P; the pixel codec."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from jaxtyping import Float
from torch import Tensor

from cfld.codec import CodecConfig, PixelCodec
from cfld.config import CFLDConfig
from cfld.config_file import merge_settings
from cfld.model import ConditioningParts, build_conditioning_parts


class Conditioner(ModelMixin, ConfigMixin):
    """S, D, A, P and the learnable vector; its `config.json` holds the settings of all of CFLD.

    It only keeps the parts: `CFLD.condition` runs them.
    """

    @register_to_config
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self._take(build_conditioning_parts(read_settings(settings), pretrained=False))

    @classmethod
    def from_parts(cls, settings: CFLDConfig, parts: ConditioningParts) -> Conditioner:
        """Around parts that exist already, which are shared, not copied."""
        with torch.device("meta"):
            conditioner = cls(settings=asdict(settings))
        conditioner._take(parts)
        return conditioner

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Conditioner:
        """Load a folder as diffusers does, but refuse one that lacks weights or holds others.

        Raises:
            ValueError: Naming the first of the tensors that are missing or unexpected.
        """
        # By default weights begin on the meta device, where timm's Swin would leave its masks.
        options |= {"low_cpu_mem_usage": False, "output_loading_info": True}
        device_map = options.pop("device_map", None)  # which needs the meta device
        with torch.random.fork_rng(devices=[]):  # for the random weights that are replaced
            conditioner, found = super().from_pretrained(*arguments, **options)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found[problem]:
                names = sorted(map(str, found[problem]))
                raise ValueError(
                    f"{arguments[0]}: {len(names)} {problem.replace('_', ' ')}, such as {names[0]}"
                )
        if device_map is not None:
            conditioner.to(device_map[""] if isinstance(device_map, dict) else device_map)
        return conditioner

    @cached_property
    def settings(self) -> CFLDConfig:
        """The settings of CFLD."""
        return read_settings(self.config["settings"])

    @property
    def parts(self) -> ConditioningParts:
        """The parts as `CFLD` takes them."""
        return ConditioningParts.of(self)

    def _take(self, parts: ConditioningParts) -> None:
        for name, part in vars(parts).items():
            setattr(self, name, part)


class PixelAutoencoder(ModelMixin, ConfigMixin):
    """The pixel codec in the place of a pipeline's VAE."""

    @register_to_config
    def __init__(self, factor: int = 4, scaling_factor: float = 1.0) -> None:
        super().__init__()
        del scaling_factor  # read from the configuration, as a VAE's
        self.codec = PixelCodec(CodecConfig(kind="pixels", factor=factor))
        # Nothing is learnt, but diffusers asks each component for its type and device.
        self.register_buffer("placeholder", torch.zeros(1))

    def encode(
        self, x: Float[Tensor, "batch 3 image_height image_width"], return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The one latent of each image in [-1, 1], as the mean of a posterior."""
        posterior = DiagonalGaussianDistribution(self.codec.moments(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: Float[Tensor, "batch channels height width"], return_dict: bool = True
    ) -> DecoderOutput | tuple[Float[Tensor, "batch 3 image_height image_width"]]:
        """The images that latents were made of, in [-1, 1]."""
        images = self.codec.decode(z)
        return DecoderOutput(sample=images) if return_dict else (images,)


def read_settings(settings: dict[str, Any]) -> CFLDConfig:
    """Settings as JSON keeps them.

    Raises:
        ConfigError: If a setting is unknown or wrong.
    """
    return merge_settings(CFLDConfig(), settings, place="conditioner/config.json")
