import re
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F

from cfld.source_encoder import SourceEncoder, SourceEncoderConfig

SMALL = SourceEncoderConfig(
    image_size=(128, 128), width=16, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2), window_size=16
)
PUBLISHED = "swin_base_patch4_window12_384"


@pytest.fixture
def published():
    """A network of the published window and image size, with few channels."""
    torch.manual_seed(0)
    return timm.create_model(
        PUBLISHED, embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 1, 2, 2)
    ).state_dict()


def microsoft_layout(weights: dict) -> dict:
    """Names of the original release: patches are merged at the end of the stage before."""
    weights = {name.replace("head.fc.", "head."): tensor for name, tensor in weights.items()}
    return {
        "model": {
            re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", name): tensor
            for name, tensor in weights.items()
        }
        | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(144, 144).long()}
    }


@pytest.mark.parametrize("layout", [lambda weights: weights, microsoft_layout])
def test_pretrained_weights_load_with_resized_biases(tmp_path, published, layout):
    path = tmp_path / "swin.pth"
    torch.save(layout(published), path)
    swin = SourceEncoder(replace(SMALL, weights=str(path))).swin.state_dict()
    assert not any(name.startswith(("norm.", "head.")) for name in swin)
    for name, found in swin.items():
        expected = published[name]
        if name.endswith("relative_position_bias_table"):
            # The authors' way: bicubic from 23x23 to 31x31, or to 15x15 and 7x7 on small maps.
            side = round(found.shape[0] ** 0.5)
            grid = expected.T.view(1, -1, 23, 23)
            expected = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
            expected = expected.flatten(2)[0].T
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_biases_are_resized_to_windows_that_are_not_square(tmp_path, published):
    path = tmp_path / "swin.pth"
    torch.save(published, path)
    wide = replace(SMALL, image_size=(64, 128), weights=str(path))
    attention = SourceEncoder(wide).swin.layers[2].blocks[0].attn
    assert attention.window_size == (4, 8)
    grid = published["layers.2.blocks.0.attn.relative_position_bias_table"].T.view(1, -1, 23, 23)
    expected = F.interpolate(grid, (7, 15), mode="bicubic").flatten(2)[0].T
    torch.testing.assert_close(attention.relative_position_bias_table, expected)


def test_maps_are_the_last_outputs_of_each_stage():
    torch.manual_seed(0)
    encoder = SourceEncoder(SMALL, pretrained=False).eval()
    source = torch.randn(1, 3, 128, 128)
    outputs = []
    for stage in encoder.swin.layers:
        stage.blocks.register_forward_hook(lambda _, __, output: outputs.append(output))
    features = encoder(source)
    for feature, output, size, channels in zip(
        features, outputs, SMALL.sizes, SMALL.channels, strict=True
    ):
        assert feature.shape[1:] == (channels, *size)
        assert torch.equal(feature, output.permute(0, 3, 1, 2))


def test_windows_do_not_exceed_the_map():
    blocks = [stage.blocks for stage in SourceEncoder(SMALL, pretrained=False).swin.layers]
    assert [stage[0].window_size for stage in blocks] == [(16, 16), (16, 16), (8, 8), (4, 4)]
    assert blocks[1][1].shift_size == (0, 0)
    with torch.device("meta"):
        paper = SourceEncoder(SourceEncoderConfig(), pretrained=False).swin.layers
    windows = [[(block.window_size, block.shift_size) for block in s.blocks[:2]] for s in paper]
    whole, shifted = ((16, 16), (0, 0)), ((16, 16), (8, 8))
    assert windows == [[whole, shifted]] * 2 + [[whole] * 2] + [[((8, 8), (0, 0))] * 2]
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for stage in paper for b in stage.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.2, 24))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"image_size \(250, 256\) does not fit: .* of 32"):
        SourceEncoderConfig(image_size=(250, 256))
    with pytest.raises(ValueError, match="4 depths but 3 num_heads"):
        SourceEncoderConfig(num_heads=(4, 8, 16))
