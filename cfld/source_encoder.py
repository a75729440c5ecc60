"""S: a Swin Transformer that turns the source image into feature maps of falling resolution."""

from collections.abc import Mapping
from dataclasses import dataclass

import timm
from jaxtyping import Float
from timm.layers import resize_rel_pos_bias_table_simple
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from torch import Tensor, nn

from cfld.checks import check_multiples, check_sizes


@dataclass(frozen=True, kw_only=True)
class SourceEncoderConfig:
    """Sizes of S; the defaults are the paper's Swin-B."""

    image_size: tuple[int, int] = (256, 256)
    """Height and width of the source image in pixels; every other size follows from it."""
    patch_size: int = 4
    width: int = 128
    """Channels of the first stage; each later stage doubles them."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    window_size: int = 16
    drop_path: float = 0.2
    """Rate of stochastic depth in the last block, falling linearly to 0 in the first."""
    pretrained: str | None = "swin_base_patch4_window12_384.ms_in22k_ft_in1k"
    """timm's name of the network whose weights start the training; random ones without it."""
    weights: str | None = None
    """A file with these weights instead of timm's download, in timm's or Microsoft's layout."""

    def __post_init__(self) -> None:
        names = ("image_size", "patch_size", "width", "depths", "num_heads", "window_size")
        check_sizes("source_encoder", self, *names)
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"source_encoder.drop_path is {self.drop_path}; it must lie in [0, 1)")
        if len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"source_encoder: {len(self.depths)} depths but {len(self.num_heads)} num_heads; "
                "give one of each per stage"
            )
        check_multiples(
            "source_encoder's channels", self.channels, "source_encoder.num_heads", self.num_heads
        )
        if any(size % self.reduction for size in self.image_size):
            raise ValueError(
                f"source_encoder.image_size {tuple(self.image_size)} does not fit: height and "
                f"width must be multiples of {self.reduction} (patch_size x 2^(stages - 1))"
            )

    @property
    def reduction(self) -> int:
        """Pixels along one side of a token of the last stage."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each feature map."""
        return tuple(self.width * 2**stage for stage in range(len(self.depths)))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each feature map."""
        height, width = (size // self.patch_size for size in self.image_size)
        return tuple((height >> stage, width >> stage) for stage in range(len(self.depths)))


class SourceEncoder(nn.Module):
    """Swin Transformer returning the last output of each stage, not normalised (CFLD Fig. 2, S)."""

    def __init__(self, config: SourceEncoderConfig, *, pretrained: bool = True) -> None:
        super().__init__()
        self.image_size = tuple(config.image_size)
        self.swin = SwinTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depths=tuple(config.depths),
            num_heads=tuple(config.num_heads),
            window_size=config.window_size,
            drop_path_rate=config.drop_path,
            num_classes=0,
        )
        self.swin.prune_intermediate_layers(
            list(range(len(config.depths))), prune_norm=True, prune_head=True
        )
        if pretrained and config.pretrained:
            weights = pretrained_weights(config, config.pretrained)
            self.swin.load_state_dict(fit_bias_tables(weights, self.swin))

    def forward(
        self, source: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch _c _h _w"], ...]:
        """Feature maps, finest first; `source` lies in [-1, 1].

        Raises:
            ValueError: If the image has another size than the configuration.
        """
        if tuple(source.shape[-2:]) != self.image_size:
            raise ValueError(
                f"source image of {tuple(source.shape[-2:])} does not fit: resize it to "
                f"{self.image_size} (height, width), or change source_encoder.image_size"
            )
        return tuple(self.swin.forward_intermediates(source, intermediates_only=True))


def pretrained_weights(config: SourceEncoderConfig, architecture: str) -> dict[str, Tensor]:
    """Weights of the published network at its own image and window size, without its classifier."""
    published = timm.create_model(
        architecture,
        pretrained=True,
        pretrained_cfg_overlay={"file": config.weights} if config.weights else None,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depths=tuple(config.depths),
        num_heads=tuple(config.num_heads),
        num_classes=0,
    )
    kept = published.state_dict()
    return {name: kept[name] for name in kept if not name.startswith(("norm.", "head."))}


def fit_bias_tables(weights: Mapping[str, Tensor], swin: SwinTransformer) -> dict[str, Tensor]:
    """Resize the tables of relative-position biases in `weights` to the windows of `swin`.

    As the authors do: bicubic over the (2w-1)x(2w-1) offsets of a square window. timm would
    stretch the offsets geometrically, which gives other values.
    """
    tables = {}
    for name, layer in swin.named_modules():
        if isinstance(layer, WindowAttention):
            table = f"{name}.relative_position_bias_table"
            shape = tuple(layer.relative_position_bias_table.shape)
            tables[table] = resize_rel_pos_bias_table_simple(
                weights[table], layer.window_size, shape
            )
    return {**weights, **tables}
