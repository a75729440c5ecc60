from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange

from cfld.picture_grid import Tile, draw_grid, in_rows, join_strip
from cfld.visualization import (
    bias_components,
    bias_sizes,
    bias_strength,
    overlay_heat,
    paint_heat,
    query_attention,
)

MAP_SIZE = (4, 6)
CELL_PX = 16


@pytest.fixture(scope="module")
def wide(micro, build):
    """A model whose last feature map is wider than high, so that swapped axes show."""
    config = micro["pixels"]
    encoder = replace(
        config.source_encoder, image_size=(64, 96), depths=(1, 1, 1), num_heads=(1, 2, 4)
    )
    decoder = replace(config.prompt_decoder, num_queries=5, depth=3)
    return build(replace(config, source_encoder=encoder, prompt_decoder=decoder), stirred=True)


@pytest.fixture(scope="module")
def source():
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_attention_has_a_map_per_query_that_sums_to_1(wide, source):
    maps = query_attention(wide, source)
    assert len(maps) == 3
    for block in maps:
        assert block.shape == (2, 2, 5, *MAP_SIZE)
        assert (block >= 0).all()
        torch.testing.assert_close(block.sum(dim=(-1, -2)), torch.ones(2, 2, 5))


def test_the_maps_are_the_weights_that_the_layer_uses(wide, source):
    calls = []
    layer = wide.prompt_decoder.blocks[1].cross_attention
    hook = layer.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output)))
    weights = rearrange(query_attention(wide, source)[1], "b h q y x -> b h q (y x)")
    hook.remove()
    ((_, context), expected) = calls[0]
    values = rearrange(layer.to_v(context), "b n (h d) -> b h n d", h=layer.heads)
    with torch.no_grad():
        mixed = rearrange(weights @ values, "b h q d -> b q (h d)")
        torch.testing.assert_close(layer.to_out[0](mixed), expected)


@pytest.mark.parametrize("cell", [(0, 0), (1, 4), (3, 1)])
def test_a_bright_spot_shows_where_it_is(wide, cell):
    row, column = cell
    black = -torch.ones(1, 3, 64, 96)
    spotted = black.clone()
    spotted[..., row * CELL_PX : (row + 1) * CELL_PX, column * CELL_PX : (column + 1) * CELL_PX] = 1
    before, after = query_attention(wide, black)[0], query_attention(wide, spotted)[0]
    change = (after - before).abs().mean(dim=(0, 1, 2))
    assert np.unravel_index(int(change.argmax()), MAP_SIZE) == cell


def test_watching_changes_nothing(wide, source):
    with torch.no_grad():
        before = wide.encode_source(source).prompt
        query_attention(wide, source)
        assert torch.equal(wide.encode_source(source).prompt, before)
    assert not any(b.cross_attention._forward_pre_hooks for b in wide.prompt_decoder.blocks)


def test_other_prompts_have_no_queries(micro, build, source):
    config = micro["pixels"]
    decoder = replace(config.prompt_decoder, kind="features")
    model = build(replace(config, prompt_decoder=decoder))
    with pytest.raises(ValueError, match="kind is 'features': no queries attend"):
        query_attention(model, source)


def test_biases_are_maps_in_row_major_order(wide, source):
    sizes = bias_sizes(wide.config)
    with torch.no_grad():
        biases = wide.encode_source(source).appearance_biases
    assert sizes == [(4, 6)] * 2 + [(8, 12)] * 2 + [(16, 24)] * 2
    assert [bias.shape[1] for bias in biases] == [height * width for height, width in sizes]
    bias = torch.zeros(24, 8)
    bias[1 * 6 + 4] = 3.0
    strength = bias_strength(bias, (4, 6))
    assert strength.shape == (4, 6)
    assert strength[1, 4] == pytest.approx(3 * 8**0.5)
    assert strength.sum() == strength[1, 4]


def test_context_biases_lie_on_the_prompts_map(micro):
    config = micro["pixels"]
    assert config.source_encoder.sizes[-1] == (1, 1)
    biased = replace(config, appearance=replace(config.appearance, biases="context"))
    assert set(bias_sizes(biased)) == {(1, 1)}


def test_components_colour_equal_tokens_alike():
    left, right = torch.tensor([1.0, 0, 0, 0, 0]), torch.tensor([0, 2.0, 0, 0, 0])
    rows = [torch.stack([left, left, right])] * 2
    picture = bias_components(torch.cat(rows), (2, 3)).astype(int)
    assert picture.shape == (2, 3, 3)
    np.testing.assert_array_equal(picture[:, 0], picture[:, 1])
    assert np.abs(picture[:, 0] - picture[:, 2]).max() > 100
    np.testing.assert_array_equal(picture, bias_components(torch.cat(rows), (2, 3)))


def test_components_of_few_tokens_and_of_none_that_vary():
    assert bias_components(torch.ones(1, 4), (1, 1)).shape == (1, 1, 3)
    assert (bias_components(torch.ones(6, 4), (2, 3)) == 128).all()


def test_heat_is_brightest_at_the_spot():
    values = np.zeros(MAP_SIZE, np.float32)
    values[1, 4] = 0.3
    heat = paint_heat(values).sum(axis=2)
    assert np.unravel_index(heat.argmax(), MAP_SIZE) == (1, 4)
    assert (heat == heat.min()).sum() == 23
    photo = np.full((64, 96, 3), 100, np.uint8)
    overlaid = overlay_heat(photo, values).astype(int).sum(axis=2)
    y, x = np.unravel_index(overlaid.argmax(), overlaid.shape)
    assert (y // CELL_PX, x // CELL_PX) == (1, 4)
    assert overlaid.shape == (64, 96)
    assert (paint_heat(np.zeros(MAP_SIZE)) == paint_heat(np.zeros(MAP_SIZE))[0, 0]).all()


def test_a_grid_holds_its_pictures_in_order():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    tiles = [Tile(np.full((5, 5, 3), colour, np.uint8), f"{colour}") for colour in colours]
    grid = np.asarray(draw_grid(in_rows(tiles, 2), (40, 30)))
    places = [np.argwhere((grid == colour).all(axis=2)) for colour in colours]
    for place in places:
        height, width = place.max(axis=0) - place.min(axis=0) + 1
        assert (height, width) == (40, 30)
    tops, lefts = zip(*(place.min(axis=0) for place in places), strict=True)
    assert tops[0] == tops[1] < tops[2]
    assert lefts[0] == lefts[2] < lefts[1]
    assert ((grid[: tops[0]] < 100).any(axis=2)).any()  # the labels


def test_long_labels_do_not_overlap():
    white = np.full((4, 4, 3), 255, np.uint8)
    narrow = draw_grid([[Tile(white, "a"), Tile(white, "b")]], (20, 20))
    wide = draw_grid([[Tile(white, "a" * 30), Tile(white, "b")]], (20, 20))
    assert wide.width > narrow.width + 200


def test_a_strip_has_no_gaps():
    frames = [draw_grid([[Tile(np.zeros((4, 4, 3), np.uint8), str(n))]], (9, 9)) for n in range(3)]
    strip = np.asarray(join_strip(frames))
    np.testing.assert_array_equal(strip, np.concatenate([np.asarray(f) for f in frames], axis=1))
