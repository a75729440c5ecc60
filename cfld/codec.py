"""From images to latents and back: Stable Diffusion's VAE, or pixels rearranged."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Generator, Tensor, nn

from cfld.checks import check_choice, check_multiples, check_sizes
from cfld.unet import STABLE_DIFFUSION, check_complete

Images = Float[Tensor, "batch 3 height width"]
Moments = Float[Tensor, "batch moments latent_height latent_width"]
Latents = Float[Tensor, "batch channels latent_height latent_width"]
Generators = Generator | list[Generator]


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Which codec, and its sizes; the defaults are Stable Diffusion 1.5's VAE."""

    kind: str = "vae"
    """`vae`, or `pixels`."""
    factor: int = 8
    """Pixels along one side of a latent."""
    channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of the VAE at each level, finest first."""
    layers_per_block: int = 2
    num_groups: int = 32
    pretrained: str | None = STABLE_DIFFUSION
    """Hub name or folder of the VAE, or of the pipeline (`vae/`) it comes from; random without."""

    def __post_init__(self) -> None:
        check_choice("codec.kind", self.kind, CODECS)
        check_sizes("codec", self, "factor", "channels", "layers_per_block", "num_groups")
        check_multiples("codec.channels", self.channels, "codec.num_groups", self.num_groups)
        if self.kind == "vae" and self.factor != 2 ** (len(self.channels) - 1):
            raise ValueError(
                f"codec.factor {self.factor} does not fit {len(self.channels)} levels of channels; "
                f"set it to {2 ** (len(self.channels) - 1)}"
            )

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return 4 if self.kind == "vae" else 3 * self.factor**2


class VaeCodec(nn.Module):
    """Stable Diffusion's VAE, frozen."""

    def __init__(self, config: CodecConfig, *, pretrained: bool = True) -> None:
        super().__init__()
        if pretrained and config.pretrained:
            self.vae = load_vae(config.pretrained)
        else:
            self.vae = AutoencoderKL(
                block_out_channels=tuple(config.channels),
                down_block_types=("DownEncoderBlock2D",) * len(config.channels),
                up_block_types=("UpDecoderBlock2D",) * len(config.channels),
                layers_per_block=config.layers_per_block,
                norm_num_groups=config.num_groups,
                latent_channels=config.latent_channels,
            )
        self.vae.enable_slicing()
        self.requires_grad_(False)

    def hash_encoder(self) -> str:
        """SHA-256 of the weights, in fp32, that moments depend on; wherever the VAE was saved."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.vae.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.")):
                digest.update(f"{name} {list(tensor.shape)}".encode())
                digest.update(tensor.to("cpu", torch.float32).numpy().tobytes())
        return digest.hexdigest()

    def encode(self, images: Images, generator: Generators | None = None) -> Latents:
        """Latents drawn from the posterior of `images`, scaled to about unit variance."""
        return self.sample(self.moments(images), generator)

    @torch.no_grad()
    def moments(self, images: Images) -> Moments:
        """Posterior means, then log-variances, along the channels: what shards store."""
        return self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters

    def sample(
        self,
        moments: Moments,
        generator: Generators | None = None,
        *,
        noise: Latents | None = None,
    ) -> Latents:
        """Latents drawn from a (stored) posterior, one generator for all images or one for each.

        Standard normal `noise` is used instead of drawing some.
        """
        mean, log_variance = moments.to(torch.float32).chunk(2, dim=1)
        if noise is None:
            noise = randn_tensor(mean.shape, generator, mean.device, mean.dtype)
        sampled = mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise
        return sampled * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Latents) -> Images:
        """Images, about in [-1, 1]."""
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample


class PixelCodec(nn.Module):
    """Each square of pixels becomes the channels of one latent, shifted; nothing is learnt."""

    shift = 0.25

    def __init__(self, config: CodecConfig, *, pretrained: bool = True) -> None:
        super().__init__()
        del pretrained
        self.factor = config.factor

    def encode(self, images: Images, generator: Generators | None = None) -> Latents:
        """The one latent of each image; `generator` is not used."""
        return self.sample(self.moments(images), generator)

    def moments(self, images: Images) -> Moments:
        """The latent as the mean, with the smallest log-variance diffusers knows."""
        mean = F.pixel_unshuffle(images, self.factor) + self.shift
        return torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)

    def sample(
        self,
        moments: Moments,
        generator: Generators | None = None,
        *,
        noise: Latents | None = None,
    ) -> Latents:
        """The mean; neither `generator` nor `noise` is used."""
        del generator, noise
        return moments.chunk(2, dim=1)[0]

    def decode(self, latents: Latents) -> Images:
        """The image a latent was made of."""
        return F.pixel_shuffle(latents - self.shift, self.factor)


def load_vae(place: str) -> AutoencoderKL:
    """Load the VAE at a folder or hub name, or in the `vae` folder of a pipeline there.

    Raises:
        OSError: If there is none.
        ValueError: If what is there is no `AutoencoderKL`, or lacks weights.
    """
    try:
        subfolder = "vae"
        config = AutoencoderKL.load_config(place, subfolder=subfolder)
    except OSError:
        subfolder = ""
        config = AutoencoderKL.load_config(place)
    found = config.get("_class_name")
    if found != AutoencoderKL.__name__:
        what = "a network of another library" if found is None else f"a {found}"
        raise ValueError(f"{place}: holds {what}, not an {AutoencoderKL.__name__}")
    vae = AutoencoderKL.from_pretrained(place, subfolder=subfolder, use_safetensors=True)
    check_complete(vae, str(Path(place, subfolder)))
    return vae


Codec = VaeCodec | PixelCodec
CODECS: dict[str, type[VaeCodec] | type[PixelCodec]] = {"vae": VaeCodec, "pixels": PixelCodec}


def build_codec(config: CodecConfig, *, pretrained: bool = True) -> Codec:
    """The codec of a configuration."""
    return CODECS[config.kind](config, pretrained=pretrained)
