from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfld.appearance import AppearanceConfig
from cfld.config import PRESETS
from cfld.prompt_decoder import PromptDecoderConfig
from cfld.unet import UNetConfig, build_unet

CONFIG = replace(PRESETS["tiny"].unet, channels=(8, 8, 8, 8), is_frozen=True)
SIZES = {"latent_channels": 4, "prompt_dim": 12, "latent_size": (8, 8)}


def test_pretrained_unet_loads_from_a_local_folder(tmp_path):
    saved = build_unet(CONFIG, **SIZES)
    saved.save_pretrained(tmp_path / "unet")
    loaded = build_unet(replace(CONFIG, pretrained=str(tmp_path)), **SIZES)
    for (name, found), expected in zip(loaded.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(found, expected), name
        assert found.requires_grad == expected.requires_grad


def test_pretrained_unet_of_another_size_is_refused(tmp_path):
    build_unet(CONFIG, **SIZES).save_pretrained(tmp_path / "unet")
    other = replace(CONFIG, pretrained=str(tmp_path), num_heads=4)
    with pytest.raises(ValueError, match=r"its UNet has attention_head_dim 2, .* wants 4"):
        build_unet(other, **SIZES)


def test_pretrained_unet_that_lacks_weights_is_refused(tmp_path):
    build_unet(CONFIG, **SIZES).save_pretrained(tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_out.bias"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"unet: 1 weights are missing, such as conv_out\.bias"):
        build_unet(replace(CONFIG, pretrained=str(tmp_path)), **SIZES)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match=r"unet.trained has \['to_out'\]; choose among"):
        UNetConfig(trained=("to_k", "to_out"))
    with pytest.raises(ValueError, match=r"appearance\.biases is 'values'; choose one of"):
        AppearanceConfig(biases="values")
    with pytest.raises(
        ValueError, match=r"widths is \(64, 100\); give multiples of appearance\.head_dim, 32"
    ):
        AppearanceConfig(widths=(64, 100))
    with pytest.raises(ValueError, match=r"prompt_decoder\.kind is 'text'; choose one of"):
        PromptDecoderConfig(kind="text")
    with pytest.raises(
        ValueError, match=r"dim is 768; give multiples of prompt_decoder\.num_heads, 7"
    ):
        PromptDecoderConfig(num_heads=7)
