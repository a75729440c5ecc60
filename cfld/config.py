"""All settings of CFLD, how they depend on each other, and the two presets."""

from dataclasses import dataclass, field

from cfld.appearance import AppearanceConfig, BranchShape
from cfld.attention import ATTENTION
from cfld.checks import check_choice, check_multiples
from cfld.codec import CodecConfig
from cfld.objective import DiffusionConfig
from cfld.pose_adapter import PoseAdapterConfig
from cfld.prompt_decoder import FeatureShape, PromptDecoderConfig
from cfld.source_encoder import SourceEncoderConfig
from cfld.unet import UNetConfig

PARTS = ("source_encoder", "prompt_decoder", "appearance", "pose_adapter", "unet")


@dataclass(frozen=True, kw_only=True)
class CFLDConfig:
    """All parts; the defaults are the paper's. Every image size follows from the source's."""

    source_encoder: SourceEncoderConfig = field(default_factory=SourceEncoderConfig)
    prompt_decoder: PromptDecoderConfig = field(default_factory=PromptDecoderConfig)
    appearance: AppearanceConfig = field(default_factory=AppearanceConfig)
    pose_adapter: PoseAdapterConfig = field(default_factory=PoseAdapterConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    attention: str = "sdpa"
    """torch's fused attention (`sdpa`) or three plain operations (`plain`)."""
    gradient_checkpointing: tuple[str, ...] = ()
    """Parts that recompute their activations in the backward."""

    def __post_init__(self) -> None:
        check_choice("attention", self.attention, ATTENTION)
        unknown = set(self.gradient_checkpointing) - set(PARTS)
        if unknown:
            raise ValueError(f"gradient_checkpointing has {sorted(unknown)}; choose among {PARTS}")
        stages = len(self.source_encoder.depths)
        if min(stages, len(self.appearance.widths)) < self.num_levels:
            raise ValueError(
                f"the UNet has {self.num_levels} levels with attention, so it needs as many "
                f"stages in source_encoder (has {stages}) and widths in appearance "
                f"(has {len(self.appearance.widths)})"
            )
        check_multiples(
            "unet.channels",
            self.unet.channels,
            "pose_adapter.num_groups",
            self.pose_adapter.num_groups,
        )
        if any(size % 2**self.num_levels for size in self.latent_size):
            raise ValueError(
                f"latents of {self.latent_size} do not fit {self.num_levels} halvings in the UNet; "
                "choose another source_encoder.image_size"
            )

    @property
    def num_levels(self) -> int:
        """Levels of the UNet that have attention."""
        return len(self.unet.channels) - 1

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents: as many as the first feature map has tokens."""
        return self.source_encoder.sizes[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the generated image in pixels."""
        height, width = self.latent_size
        return height * self.codec.factor, width * self.codec.factor

    @property
    def pose_map_size(self) -> tuple[int, int]:
        """Height and width of the pose map in pixels."""
        height, width = self.latent_size
        return height * self.pose_adapter.patch_size, width * self.pose_adapter.patch_size

    @property
    def feature_shape(self) -> FeatureShape:
        """The last feature map, D's input."""
        height, width = self.source_encoder.sizes[-1]
        return FeatureShape(dim=self.source_encoder.channels[-1], num_tokens=height * width)

    @property
    def branch_shapes(self) -> tuple[BranchShape, ...]:
        """One branch of A for each up-sampling cross-attention, in the UNet's order."""
        last = len(self.source_encoder.depths) - 1
        fills_prompt = self.appearance.biases == "context"
        return tuple(
            BranchShape(
                level=level,
                feature_dim=self.source_encoder.channels[level],
                bias_dim=self.prompt_decoder.dim if fills_prompt else self.unet.channels[level],
                stride=2 ** (last - level) if fills_prompt else 1,
            )
            for level in reversed(range(self.num_levels))
            for _ in range(self.unet.layers_per_block + 1)
        )


PRESETS: dict[str, CFLDConfig] = {
    "paper": CFLDConfig(),
    "tiny": CFLDConfig(
        source_encoder=SourceEncoderConfig(
            image_size=(64, 64),
            width=32,
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 4, 8),
            window_size=8,
            drop_path=0.0,
            pretrained=None,
        ),
        prompt_decoder=PromptDecoderConfig(depth=2, dim=128, num_heads=4),
        appearance=AppearanceConfig(depth=1, widths=(32, 64, 128)),
        pose_adapter=PoseAdapterConfig(num_groups=8),
        unet=UNetConfig(
            channels=(48, 64, 96, 96),
            layers_per_block=1,
            num_heads=2,
            num_groups=8,
            pretrained=None,
            is_frozen=False,
        ),
        codec=CodecConfig(kind="pixels", factor=4, pretrained=None),
        diffusion=DiffusionConfig(prediction_type="sample", zero_terminal_snr=True),
        attention="plain",
    ),
}
