import json
import pickle
import re
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from cfld.config import PRESETS
from cfld.import_official import CheckpointError, import_model, main, read_tensors
from cfld.official import our_name
from cfld.pipeline import CFLDPipeline


def official_names(official_keys, config):
    """The authors' names that a configuration has: those of the paper whose parts it has too."""
    names = {}
    for official in (*official_keys["pytorch_model.bin"], *official_keys["pytorch_model_1.bin"]):
        ours = our_name(official, len(config.branch_shapes))
        if ours is not None:
            names[ours] = official
    return names


@pytest.fixture(scope="module")
def official_keys(shared_dir):
    return json.loads((shared_dir / "reference" / "official_keys.json").read_text())


@pytest.fixture(scope="module")
def small(micro):
    """Like the paper's wiring, where A has nine branches, but narrow."""
    micro = micro["vae"]
    return replace(
        micro,
        unet=replace(micro.unet, layers_per_block=2),
        source_encoder=replace(micro.source_encoder, depths=(2, 2, 2, 2)),
        diffusion=PRESETS["paper"].diffusion,
    )


@pytest.fixture(scope="module")
def source_model(small, build):
    return build(small, stirred=True)


@pytest.fixture(scope="module")
def checkpoint(official_keys, source_model):
    """The weights of a small model as the authors' two files hold them."""
    names = official_names(official_keys, source_model.config)
    tensors = {names[ours]: tensor for ours, tensor in source_model.state_dict().items()}
    # Buffers that their files hold and we compute.
    tensors["backbone.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    tensors["backbone.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16).long()
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    return {name: tensors[name] for name in tensors.keys() - unet.keys()}, unet


@pytest.fixture
def files(checkpoint, tmp_path):
    paths = tmp_path / "pytorch_model.bin", tmp_path / "pytorch_model_1.bin"
    for path, tensors in zip(paths, checkpoint, strict=True):
        torch.save(tensors, path)
    return paths


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "preset: tiny\n"
        "source_encoder: {image_size: [32, 32], width: 16, depths: [2, 2, 2, 2], window_size: 4}\n"
        "prompt_decoder: {num_queries: 4, depth: 1, dim: 32, num_heads: 2}\n"
        "appearance: {widths: [16, 16, 32], head_dim: 16}\n"
        "unet: {channels: [32, 32, 64, 64], layers_per_block: 2, is_frozen: true}\n"
        "codec: {kind: vae, factor: 2, channels: [16, 32], num_groups: 8}\n"
        "diffusion: {prediction_type: epsilon, zero_terminal_snr: false}\n"
    )
    return path


def vae_sizes():
    return {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 8,
    }


@pytest.fixture
def vae_folder(tmp_path):
    AutoencoderKL(**vae_sizes()).save_pretrained(tmp_path / "base" / "vae")
    return tmp_path / "base"


def prediction(model):
    generator = torch.Generator().manual_seed(0)
    source, pose_map = (torch.rand(1, c, 32, 32, generator=generator) for c in (3, 21))
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return model.eval().predict(latents, torch.tensor(500), model.condition(source, pose_map))


def test_every_parameter_is_filled_and_the_prediction_is_the_same(
    source_model, files, config_file, vae_folder, tmp_path
):
    arguments = ["--model", str(files[0]), "--unet", str(files[1]), "--config", str(config_file)]
    arguments += ["--vae", str(vae_folder), "--output", str(tmp_path / "weights")]
    assert main(arguments) == 0
    model = CFLDPipeline.from_pretrained(tmp_path / "weights").to_model()
    assert replace(model.config, codec=source_model.config.codec) == source_model.config
    found = model.state_dict()
    for name, tensor in source_model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=0, rtol=0)
    torch.testing.assert_close(prediction(model), prediction(source_model), atol=1e-5, rtol=0)
    torch.testing.assert_close(prediction(model), prediction(model), atol=0, rtol=0)


def test_branches_of_appearance_are_numbered_backwards(checkpoint, small):
    model = import_model(small, *checkpoint)
    for branch in range(9):
        name = f"appearance_encoder.zero_conv_outs.{branch}.weight"
        assert model.appearance.branches[8 - branch].conv_out.weight.equal(checkpoint[0][name])


def test_the_papers_sizes_fit_the_authors_files(official_keys):
    files = [
        {
            name: torch.empty(entry["shape"], device="meta")
            for name, entry in official_keys[file].items()
        }
        for file in ("pytorch_model.bin", "pytorch_model_1.bin")
    ]
    model = import_model(PRESETS["paper"], *files)
    counts = official_keys["counts"]
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == counts["model_total"] + counts["unet_total"]
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_safetensors_are_read_too(checkpoint, small, source_model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(checkpoint[0], path)
    model = import_model(small, read_tensors(path), checkpoint[1])
    torch.testing.assert_close(prediction(model), prediction(source_model), atol=1e-5, rtol=0)


def test_files_of_old_versions_of_torch_are_read_too(tmp_path):
    path = tmp_path / "old.bin"
    torch.save({"weight": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)
    assert read_tensors(path)["weight"].tolist() == [0, 1, 2]


def test_whole_numbers_are_no_weights(checkpoint, small):
    vector = torch.zeros_like(checkpoint[0]["learnable_vector"]).long()
    with pytest.raises(CheckpointError, match="1 tensors are no floating-point numbers:\n  learn"):
        import_model(small, checkpoint[0] | {"learnable_vector": vector}, checkpoint[1])


def test_half_precision_files_become_float32(checkpoint, small):
    halves = [{name: t.half() for name, t in tensors.items()} for tensors in checkpoint]
    assert import_model(small, *halves).unet.dtype == torch.float32


def test_what_does_not_fit_is_listed(checkpoint, small):
    conditioning, unet = (dict(tensors) for tensors in checkpoint)
    del conditioning["learnable_vector"]
    conditioning["decoder.query_feat"] = torch.zeros(5, 32)
    conditioning["decoder.colour"] = torch.zeros(1)
    for number in reversed(range(30, 50)):
        unet[f"model.down_blocks.{number}.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        import_model(small, conditioning, unet)
    message = str(caught.value)
    assert "1 tensors are missing (in our names):\n  learnable_vector\n" in message
    assert "1 tensors have another shape:\n  decoder.query_feat (5, 32), not (4, 32)" in message
    assert "21 tensors are not known to this configuration:\n  decoder.colour\n" in message
    listed = [line.strip() for line in message.splitlines() if "down_blocks" in line]
    assert listed == [f"model.down_blocks.{number}.weight" for number in range(30, 50)]
    with pytest.raises(CheckpointError, match=r"both files hold 1 tensors .*\n  model.conv_in"):
        import_model(small, {"model.conv_in.bias": unet["model.conv_in.bias"]}, unet)


class Hostile:
    """Unpickled by Python itself, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")  # a file that appears if this is run


@pytest.mark.parametrize("is_zipped", [True, False])
def test_a_hostile_pickle_runs_no_code(tmp_path, is_zipped):
    path, trace = tmp_path / "hostile.bin", tmp_path / "trace"
    content = {"learnable_vector": Hostile(trace)}
    if is_zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"may run code|cannot be read as a checkpoint"):
        read_tensors(path)
    assert not trace.exists()


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    path = tmp_path / "file.bin"
    with pytest.raises(CheckpointError, match="no such file"):
        read_tensors(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_tensors(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list, not named tensors"):
        read_tensors(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match="1 entries that are no dense tensors:\n  epoch"):
        read_tensors(path)
    torch.save({"weight": torch.eye(3).to_sparse()}, path)
    with pytest.raises(CheckpointError, match="1 entries that are no dense tensors:\n  weight"):
        read_tensors(path)
    torch.save({"weight": torch.tensor([1.0, float("nan")]), "index": torch.arange(3)}, path)
    with pytest.raises(CheckpointError, match=r"1 tensors with values .* not finite:\n  weight"):
        read_tensors(path)
    broken = tmp_path / "file.safetensors"
    broken.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_tensors(broken)


def test_the_command_refuses_before_it_writes(files, config_file, vae_folder, tmp_path, caplog):
    output = tmp_path / "weights"
    arguments = ["--model", str(files[0]), "--unet", str(files[1]), "--output", str(output)]
    small = ["--config", str(config_file)]
    for extra, message in (
        ([*small], "the configuration names no VAE; give --vae"),
        ([*small, "--vae", str(tmp_path)], "no VAE can be had from there"),
        ([*small, "--vae", str(vae_folder), "--unet", "none.bin"], "none.bin: no such file"),
        (["--config", "huge"], "huge: neither a preset"),
    ):
        caplog.clear()
        assert main([*arguments, *extra]) == 2
        assert message in caplog.text
    wide = AutoencoderKL(**vae_sizes(), latent_channels=8)
    wide.save_pretrained(tmp_path / "wide" / "vae")
    assert main([*arguments, *small, "--vae", str(tmp_path / "wide")]) == 2
    assert "latents of its VAE have 8 channels, not 4" in caplog.text
    assert main([*arguments, *small, "--output", str(files[0])]) == 2
    assert "is a file; give a folder" in caplog.text
    config_file.write_text(
        config_file.read_text().replace(
            "factor: 2, channels: [16, 32]", "factor: 4, channels: [8, 16, 32]"
        )
    )
    assert main([*arguments, *small, "--vae", str(vae_folder)]) == 2
    assert re.search(r"its VAE is 2 pixels wide, the configuration has codec.factor 4", caplog.text)
    assert not output.exists()
