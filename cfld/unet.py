"""N: diffusers' UNet, driven through its T2I-adapter inputs and attention processors only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor, nn

from cfld.attention import ATTENTION, KeysValues, LayersKeysValues, mix_values, project_keys_values
from cfld.checks import check_multiples, check_sizes

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PROJECTIONS = ("to_q", "to_k", "to_v")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of N and which of its weights train; the defaults are Stable Diffusion 1.5's."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels at each level, finest first; the last level has no attention."""
    layers_per_block: int = 2
    num_heads: int = 8
    num_groups: int = 32
    """Groups of its group normalisation."""
    pretrained: str | None = STABLE_DIFFUSION
    """Hub name or folder of the pipeline (`unet/`) that training starts from; random without."""
    trained: tuple[str, ...] = ("to_k", "to_v")
    """Which projections of the up-sampling cross-attentions train; the rest is frozen."""
    is_frozen: bool = True
    """False trains every weight."""

    def __post_init__(self) -> None:
        check_sizes("unet", self, "channels", "layers_per_block", "num_heads", "num_groups")
        if len(self.channels) < 2:
            raise ValueError(
                f"unet.channels is {self.channels}; give at least two levels, since the last has "
                "no attention"
            )
        for name in ("num_heads", "num_groups"):
            check_multiples("unet.channels", self.channels, f"unet.{name}", getattr(self, name))
        unknown = set(self.trained) - set(PROJECTIONS)
        if unknown:
            raise ValueError(f"unet.trained has {sorted(unknown)}; choose among {PROJECTIONS}")


class LayerAttention:
    """diffusers' attention processor for one layer of N (CFLD Eq. 4).

    `prompt_index` numbers the cross-attentions, `bias_index` those of the up-sampling blocks;
    None where the layer is not one. What they select comes in through diffusers'
    `cross_attention_kwargs`, so that nothing is stored here between two calls.
    """

    def __init__(
        self, attention: str, biases: str, *, prompt_index: int | None, bias_index: int | None
    ) -> None:
        self.kernel = ATTENTION[attention]
        self.biases = biases
        self.prompt_index = prompt_index
        self.bias_index = bias_index

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "batch tokens dim"],
        encoder_hidden_states: Float[Tensor, "batch context_tokens context_dim"] | None = None,
        attention_mask: None = None,
        appearance_biases: Sequence[Float[Tensor, "batch _tokens _dim"]] = (),
        prompt_keys_values: LayersKeysValues = (),
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attend with biased queries; keys and values are projected unless they are given."""
        del attention_mask  # diffusers passes it by name; nothing here is masked
        query = attn.to_q(hidden_states)
        if self.biases == "queries" and self.bias_index is not None and appearance_biases:
            query = query + appearance_biases[self.bias_index]
        if self.prompt_index is not None and prompt_keys_values:
            keys_values = prompt_keys_values[self.prompt_index]
        elif encoder_hidden_states is None:
            keys_values = project_keys_values(attn, hidden_states)
        else:
            keys_values = self.keys_values(attn, encoder_hidden_states, appearance_biases)
        return mix_values(attn, self.kernel, query, keys_values)

    def keys_values(
        self,
        attn: Attention,
        prompt: Float[Tensor, "batch context_tokens context_dim"],
        appearance_biases: Sequence[Float[Tensor, "batch _tokens _dim"]],
    ) -> KeysValues:
        """Keys and values of the prompt for this layer."""
        if self.biases == "context" and self.bias_index is not None and appearance_biases:
            prompt = prompt + appearance_biases[self.bias_index]
        return project_keys_values(attn, prompt)


def build_unet(
    config: UNetConfig,
    *,
    latent_channels: int,
    prompt_dim: int,
    latent_size: tuple[int, int],
    pretrained: bool = True,
) -> UNet2DConditionModel:
    """Stable Diffusion's UNet, pretrained or random, with only the wanted weights trainable.

    Raises:
        ValueError: If the pretrained UNet has other sizes than the configuration, or lacks weights.
    """
    levels = len(config.channels)
    sizes = {
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        "block_out_channels": tuple(config.channels),
        "layers_per_block": config.layers_per_block,
        "cross_attention_dim": prompt_dim,
        "attention_head_dim": config.num_heads,  # diffusers' name for the number of heads
        "norm_num_groups": config.num_groups,
    }
    if pretrained and config.pretrained:
        unet = UNet2DConditionModel.from_pretrained(
            config.pretrained, subfolder="unet", use_safetensors=True
        )
        check_complete(unet, f"{config.pretrained}/unet")
        for name, wanted in sizes.items():
            found = unet.config[name]
            if (tuple(found) if isinstance(found, list) else found) != wanted:
                raise ValueError(
                    f"{config.pretrained}: its UNet has {name} {found}, the configuration wants "
                    f"{wanted}; change the configuration, or train without unet.pretrained"
                )
    else:
        unet = UNet2DConditionModel(sample_size=latent_size, **sizes)
    set_trained(unet, config)
    return unet


def check_complete(component: nn.Module, origin: str) -> None:
    """Refuse a component whose file lacked weights, of which diffusers only warns.

    Raises:
        ValueError: Naming the first of the parameters that have no values.
    """
    missing = [
        f"{place}.{name}".removeprefix(".")
        for place, module in component.named_modules()
        if not hasattr(module, "_hf_hook")  # accelerate's, which brings the values from elsewhere
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    if missing:
        raise ValueError(
            f"{origin}: {len(missing)} weights are missing, such as {missing[0]}; its files "
            "are not complete, copy or make them again"
        )


def set_trained(unet: UNet2DConditionModel, config: UNetConfig) -> None:
    """Freeze the UNet but for the wanted projections of the up-sampling cross-attentions."""
    unet.requires_grad_(not config.is_frozen)
    for name, layer in unet.named_modules():
        if is_up_cross_attention(name):
            for projection in config.trained:
                getattr(layer, projection).requires_grad_(True)


def is_up_cross_attention(name: str) -> bool:
    """Whether a module's name is that of a cross-attention in an up-sampling block."""
    return name.startswith("up_blocks.") and name.endswith(".attn2")


def install_processors(unet: UNet2DConditionModel, *, attention: str, biases: str) -> None:
    """Give each attention its processor, the cross-attentions numbered in the UNet's order."""
    suffix = ".processor"
    names = [name.removesuffix(suffix) for name in unet.attn_processors]
    prompted = [name for name in names if name.endswith(".attn2")]
    biased = [name for name in names if is_up_cross_attention(name)]
    unet.set_attn_processor(
        {
            name + suffix: LayerAttention(
                attention,
                biases,
                prompt_index=prompted.index(name) if name in prompted else None,
                bias_index=biased.index(name) if name in biased else None,
            )
            for name in names
        }
    )


def prompt_keys_values(
    unet: UNet2DConditionModel,
    prompt: Float[Tensor, "batch tokens dim"],
    appearance_biases: Sequence[Float[Tensor, "batch _tokens _dim"]],
) -> LayersKeysValues:
    """Keys and values of the prompt for every cross-attention, to be reused over all steps."""
    return tuple(
        layer.processor.keys_values(layer, prompt, appearance_biases)
        for layer in _cross_attentions(unet)
    )


def _cross_attentions(unet: UNet2DConditionModel) -> Iterator[Attention]:
    numbered = {
        module.processor.prompt_index: module
        for module in unet.modules()
        if isinstance(module, Attention) and module.processor.prompt_index is not None
    }
    return iter(numbered[index] for index in sorted(numbered))
