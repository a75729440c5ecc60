import pytest

from cfld.config import PRESETS, CFLDConfig
from cfld.config_file import ConfigError, load_config, merge_settings


def test_presets_by_name():
    for name, preset in PRESETS.items():
        assert load_config(name) == preset


def test_file_holds_differences_from_the_preset_it_names(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("preset: tiny\nunet:\n  num_heads: 4\nsource_encoder: {image_size: [64, 32]}\n")
    config = load_config(path, ["unet.layers_per_block=2"])
    assert (config.unet.num_heads, config.unet.layers_per_block) == (4, 2)
    assert config.source_encoder.image_size == (64, 32)
    assert config.unet.channels == PRESETS["tiny"].unet.channels
    path.write_text("unet: {num_heads: 4}\n")
    assert load_config(path).unet.channels == PRESETS["paper"].unet.channels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("unet: {heads: 4}", "no setting unet.heads; there are channels, layers_per_block"),
        ("unets: {}", "no setting unets; there are source_encoder"),
        ("unet: {num_heads: many}", "unet.num_heads: Value 'many'"),
        ("attention: quick", "attention is 'quick'"),
        ("preset: huge", r"preset is 'huge'; choose one of \['paper', 'tiny'\]"),
        ("- 1\n- 2", "no 'name: value' lines"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_wrong_files_are_refused(tmp_path, content, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("unet.num_heads=7", r"unet.channels is .*48.*; give multiples of unet\.num_heads, 7"),
        ("unet.num_groups=5", r"give multiples of unet\.num_groups, 5"),
        ("unet.channels=[]", r"unet\.channels is .*; give whole numbers, at least 1"),
        ("unet.channels=[48]", r"unet\.channels is .*48.*; give at least two levels"),
        ("unet.layers_per_block=0", r"layers_per_block is 0; give a whole number, at least 1"),
        ("pose_adapter.num_groups=7", r"unet.channels .* multiples of pose_adapter\.num_groups, 7"),
        ("pose_adapter.patch_size=0", r"patch_size is 0; give a whole number"),
        ("appearance.depth=-1", r"appearance\.depth is -1; give a whole number"),
        ("source_encoder.window_size=0", r"window_size is 0; give a whole number"),
        ("source_encoder.image_size=[0,0]", r"image_size is .*0, 0.*; give whole numbers"),
        ("source_encoder.num_heads=[3,3,3,3]", r"multiples of source_encoder\.num_heads, .*3, 3"),
        ("source_encoder.drop_path=1", r"drop_path is 1\.0; it must lie in \[0, 1\)"),
        ("codec.factor=0", r"codec\.factor is 0; give a whole number"),
        ("codec.num_groups=3", r"codec.channels is .*; give multiples of codec\.num_groups, 3"),
        ("prompt_decoder.dim=0", r"prompt_decoder\.dim is 0; give a whole number"),
        ("prompt_decoder.num_heads=0", r"prompt_decoder\.num_heads is 0; give a whole number"),
        ("diffusion.num_steps=0", r"diffusion\.num_steps is 0; give a whole number"),
        ("diffusion.beta_schedule=foo", r"beta_schedule is 'foo'; choose one of"),
    ],
)
def test_sizes_that_do_not_fit_are_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        load_config("tiny", [setting])


def test_wrong_names_and_overrides_are_refused():
    with pytest.raises(ConfigError, match=r"huge: neither a preset \(paper, tiny\) nor a file"):
        load_config("huge")
    with pytest.raises(ConfigError, match=r"'unet' is not of the form part.field=value"):
        load_config("tiny", ["unet"])
    with pytest.raises(ConfigError, match=r"no setting unet\.heads"):
        load_config("tiny", ["unet.heads=2"])


def test_merging_leaves_the_defaults_alone():
    defaults = CFLDConfig()
    assert merge_settings(defaults, {"unet": {"num_heads": 2}}).unet.num_heads == 2
    assert defaults == CFLDConfig()
