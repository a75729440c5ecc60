import json
from pathlib import Path

import pytest
import torch

from cfld.config import PRESETS
from cfld.model import CFLD
from cfld.official import our_name


@pytest.fixture
def listing(shared_dir: Path) -> dict:
    """Names and shapes of the authors' checkpoints, listed from their own code."""
    return json.loads((shared_dir / "reference" / "official_keys.json").read_text())


def test_every_official_tensor_has_its_place_in_paper(listing):
    with torch.device("meta"):
        ours = CFLD(PRESETS["paper"], pretrained=False).state_dict()
    filled = set()
    for file in ("pytorch_model.bin", "pytorch_model_1.bin"):
        for official, entry in listing[file].items():
            name = our_name(official, num_branches=9)
            assert (name is None) == (entry.get("kind") == "buffer"), official
            if name is not None:
                assert name not in filled
                assert list(ours[name].shape) == entry["shape"], official
                filled.add(name)
    assert filled == ours.keys()


def test_trained_weights_of_the_unet_are_the_authors(listing):
    with torch.device("meta"):
        unet = CFLD(PRESETS["paper"], pretrained=False).unet
    trained = {f"unet.{name}" for name, p in unet.named_parameters() if p.requires_grad}
    assert trained == {our_name(name, num_branches=9) for name in listing["trainable_unet"]}


def test_names_follow_the_authors_order():
    names = {
        "learnable_vector": "learnable_vector",
        "backbone.layers.0.downsample.norm.bias": (
            "source_encoder.swin.layers.1.downsample.norm.bias"
        ),
        "backbone.layers.1.blocks.1.attn_mask": None,
        "appearance_encoder.zero_conv_ins.0.bias": "appearance.branches.8.conv_in.bias",
        "appearance_encoder.blocks.7.2.norm1.bias": "appearance.branches.1.blocks.2.norm1.bias",
        "decoder.blocks.3.attn2.to_k.weight": "prompt_decoder.blocks.3.cross_attention.to_k.weight",
        "decoder.blocks.3.norm1.weight": "prompt_decoder.blocks.3.self_norm.weight",
        "pose_encoder.conv_in.bias": "pose_adapter.conv_in.bias",
        "model.conv_in.weight": "unet.conv_in.weight",
    }
    assert {official: our_name(official, num_branches=9) for official in names} == names


def test_unknown_names_are_refused():
    with pytest.raises(KeyError, match=r"backbone\.head\.weight"):
        our_name("backbone.head.weight", num_branches=9)
