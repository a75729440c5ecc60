"""Training from stored latents is training from images, and latents of another VAE are refused."""

from pathlib import Path

import pytest
import torch

from cfld.codec import CodecConfig, VaeCodec, build_codec
from preprocessing.latent_actor import LatentActor
from preprocessing.latent_stage import LatentSettings, LatentStage
from preprocessing.store import Store
from shards.format import open_shards
from tests.train.conftest import write_shards

SMALL = CodecConfig(channels=(8, 8, 8), factor=4, num_groups=4, pretrained=None)


def save_vae(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    build_codec(SMALL).vae.save_pretrained(folder)
    return str(folder)


def add_latents(folder: Path, vae: str) -> Path:
    """What `build_shards --latents` does, in this process."""
    settings = LatentSettings.of(vae, ())
    manifest = open_shards(str(folder)).manifest
    stage = LatentStage(Store.open(str(folder)), manifest, settings, {"train"})
    actor = LatentActor(stage.store, vae)
    for block in stage.blocks():
        assert actor(block)["failure"].null_count == 1
    stage.finish()
    return folder


def use_vae(vae: str) -> list[str]:
    codec = {"kind": "vae", "factor": 4, "channels": "[8,8,8]", "num_groups": 4, "pretrained": vae}
    return [f"model.codec.{name}={value}" for name, value in codec.items()]


def test_losses_are_those_of_training_from_images(runs) -> None:
    vae = save_vae(runs.folder / "vae", seed=0)
    folder = add_latents(write_shards(runs.folder / "set", size=(64, 64)), vae)
    words = [f"data.drawn.url={folder}", *use_vae(vae), "steps=2"]
    expected = runs.check(*words, "loader.use_latents=false", output="images")
    assert runs.check(*words, output="latents") == pytest.approx(expected, rel=1e-3)
    other = save_vae(runs.folder / "other", seed=1)
    assert runs.run(words[0], *use_vae(other), output="refused") == [2]
    assert f"the stored latents of drawn are of the VAE {vae}, whose weights" in runs.said()
    assert not (runs.folder / "refused").exists()


def test_latents_of_another_size_are_refused(runs) -> None:
    folder = write_shards(runs.folder / "set", latent_shape=(8, 8, 8))
    assert runs.run(f"data.drawn.url={folder}") == [2]
    expected = (
        "stored latents have the shape [8, 8, 8], the model needs [96, 16, 16]; encode images"
    )
    assert expected in runs.said()
    vae = save_vae(runs.folder / "vae", seed=0)
    assert runs.run(f"data.drawn.url={folder}", *use_vae(vae)) == [2]
    assert "build the shards with --image-size 64 64 and --latents of the model's" in runs.said()


def test_the_hash_is_of_the_weights_wherever_they_lie(tmp_path) -> None:
    vae = save_vae(tmp_path / "alone", seed=0)
    codec = VaeCodec(CodecConfig(pretrained=vae))
    codec.vae.to(torch.float16).save_pretrained(tmp_path / "pipeline" / "vae")
    sha256 = VaeCodec(CodecConfig(pretrained=str(tmp_path / "pipeline"))).hash_encoder()
    assert sha256 == codec.hash_encoder() != VaeCodec(CodecConfig(pretrained=vae)).hash_encoder()
