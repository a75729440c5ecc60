"""Stored latents: those of encoding the image, in every way and after every stop the same bytes."""

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from cfld.codec import CodecConfig, VaeCodec, build_codec
from cfld.components import PixelAutoencoder
from cfld.images import decode_image
from preprocessing.build_shards import main
from preprocessing.inspect_shards import main as inspect
from preprocessing.latent_actor import LatentActor, LatentError
from preprocessing.latent_stage import LatentSettings, LatentStage
from preprocessing.store import Store
from shards.format import ShardSet, open_shards

Build = Callable[..., ShardSet]

SMALL = CodecConfig(channels=(8, 8, 8), factor=4, layers_per_block=1, num_groups=4, pretrained=None)
OPTIONS = ("--shard-size", "0.05", "--image-size", "48", "40")


def save_vae(folder: Path, seed: int, **changes: object) -> str:
    torch.manual_seed(seed)
    vae = build_codec(SMALL).vae
    vae.register_to_config(**changes)
    vae.save_pretrained(folder)
    return str(folder)


def command(root: Path, output: Path, *options: str) -> list[str]:
    words = ["--dataset", "synthetic", "--root", str(root), "--output", str(output)]
    return [*words, *OPTIONS, *options]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def begin_latents(
    output: Path | str, vae: str, splits: Collection[str] = ("train", "test")
) -> LatentStage:
    """Begin in this process what the command does with actors."""
    settings = LatentSettings.of(vae, ())
    manifest = open_shards(str(output)).manifest
    stage = LatentStage(Store.open(str(output)), manifest, settings, splits)
    stage.begin()
    return stage


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vae(tmp_path_factory.mktemp("vae") / "small", seed=0)


@pytest.fixture(scope="module")
def plain(drawn_root: Path, build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("plain") / "out"
    build("synthetic", drawn_root, output, *OPTIONS)
    return output


@pytest.fixture(scope="module")
def stored(
    drawn_root: Path, build: Build, vae: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Shards and latents in one command."""
    output = tmp_path_factory.mktemp("stored") / "out"
    build("synthetic", drawn_root, output, *OPTIONS, "--latents", vae, "--num-workers", "1")
    assert not (output / "_work").exists()
    return output


def test_latents_are_those_of_the_stored_images(stored: Path, plain: Path, vae: str) -> None:
    shards, before = open_shards(str(stored)), open_shards(str(plain))
    codec = VaeCodec(CodecConfig(pretrained=vae))
    rows, old = shards.read_index().to_pylist(), before.read_index().to_pylist()
    for row, without in zip(rows, old, strict=True):
        for member in ("image", "pose", "json"):
            assert shards.read_member(row, member) == before.read_member(without, member)
        image = decode_image(shards.read_member(row, "image"))
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
        latent = np.load(io.BytesIO(shards.read_member(row, "latent")))
        assert latent.dtype == np.float16
        assert latent.shape == (8, 12, 10)
        expected = codec.vae.encode(pixels).latent_dist
        mean, log_variance = torch.from_numpy(latent).float().chunk(2)
        torch.testing.assert_close(mean, expected.mean[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(log_variance, expected.logvar[0], atol=1e-3, rtol=1e-3)
    assert [row["key"] for row in rows] == [row["key"] for row in old]
    for name in ("pairs.parquet", "rejects.parquet"):
        assert (stored / name).read_bytes() == (plain / name).read_bytes()


def test_the_manifest_names_the_vae(stored: Path, vae: str) -> None:
    settings = open_shards(str(stored)).manifest.settings["latents"]
    sha256 = VaeCodec(CodecConfig(pretrained=vae)).hash_encoder()
    assert settings == {
        "vae": vae, "sha256": sha256, "scaling_factor": 0.18215, "channels": 8, "factor": 4,
    }  # fmt: skip


def test_latents_added_later_with_a_stop_are_the_same_to_the_byte(
    drawn_root: Path, plain: Path, stored: Path, vae: str, tmp_path: Path, capsys
) -> None:
    output = Path(shutil.copytree(plain, tmp_path / "out"))
    stage = begin_latents(output, vae)
    actor = LatentActor(stage.store, vae)
    for block in stage.blocks()[:3]:
        actor(block)
    assert main(command(drawn_root, output)) == 0  # without latents it is complete
    stage = begin_latents(output, vae)
    assert len(stage.pending()) == len(stage.shards) - 3
    for block in stage.blocks():
        actor(block)
    assert files_of(output) == files_of(plain)  # still whole, as it was
    assert main(command(drawn_root, output, "--latents", vae)) == 0
    assert files_of(output) == files_of(stored)
    assert not (output / "_work").exists()
    capsys.readouterr()
    assert main(command(drawn_root, output, "--latents", vae)) == 0
    assert "is complete already" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_while_encoding_it_goes_on_to_the_same_bytes(
    drawn_root: Path, plain: Path, stored: Path, vae: str, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(plain, tmp_path / "out"))
    words = [sys.executable, "-m", "preprocessing.build_shards", "--num-workers", "1"]
    process = subprocess.Popen(
        [*words, *command(drawn_root, output, "--latents", vae)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    children = psutil.Process(process.pid)
    latents = output / "_work" / "latents"
    while not list(latents.glob("*.tar.parquet")) and process.poll() is None:
        psutil.wait_procs([children], timeout=0.01)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert files_of(output) == files_of(plain)  # still whole, as it was
    assert main(command(drawn_root, output, "--latents", vae)) == 0
    assert files_of(output) == files_of(stored)


def test_latents_are_added_in_a_remote_store(plain: Path, stored: Path, vae: str) -> None:
    output = "memory://latents/out"
    for name, data in files_of(plain).items():
        Store.open(output).write_bytes(name, data)
    stage = begin_latents(output, vae)
    actor = LatentActor(stage.store, vae)
    for block in stage.blocks():
        actor(block)
    stage.finish()
    stage.store.remove_work()
    found = {name: stage.store.read_bytes(name) for name in stage.store.names()}
    assert found == files_of(stored)


@pytest.mark.parametrize("num_moved", [0, 2])
def test_killed_while_shards_change_places_it_ends_with_the_same_bytes(
    drawn_root: Path, plain: Path, stored: Path, vae: str, tmp_path: Path, num_moved: int
) -> None:
    output = Path(shutil.copytree(plain, tmp_path / "out"))
    (output / "manifest.json").unlink()
    latents = Path(shutil.copytree(stored, output / "_work" / "latents"))
    for path in sorted(latents.glob("*.tar"))[:num_moved]:
        path.replace(output / path.name)
    assert main(command(drawn_root, output, "--latents", vae)) == 0
    assert files_of(output) == files_of(stored)
    assert not (output / "_work").exists()


def test_photos_kept_as_they_are_have_none(stored: Path, plain: Path, vae: str, tmp_path) -> None:
    """The default: resized images to train on, untouched ones to compare with."""
    output = Path(shutil.copytree(plain, tmp_path / "out"))
    stage = begin_latents(output, vae, splits={"train"})
    actor = LatentActor(stage.store, vae)
    for block in stage.blocks():
        actor(block)
    stage.finish()
    shards = open_shards(str(output))
    for row in shards.read_index(["split", "latent_size"]).to_pylist():
        has_latent = row["latent_size"] == 128 + 2 * 8 * 12 * 10
        assert has_latent if row["split"] == "train" else row["latent_size"] is None
    for shard in shards.manifest.shards:
        other = stored if shard.split == "train" else plain
        assert (output / shard.name).read_bytes() == (other / shard.name).read_bytes()
    assert inspect([str(output), "--verify"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "original"], r"these are kept as they are; give --image-size"),
        (["--image-size", "50", "40"], r"image size 50 40 is no multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    drawn_root: Path, vae: str, tmp_path: Path, caplog, options, message
) -> None:
    output = tmp_path / "out"
    assert main([*command(drawn_root, output, "--latents", vae), *options]) == 2
    assert re.search(message, caplog.text)
    assert not output.exists()


def test_what_is_no_vae_is_refused(drawn_root: Path, tmp_path: Path, caplog) -> None:
    (tmp_path / "empty").mkdir()
    PixelAutoencoder().save_pretrained(tmp_path / "pixels" / "vae")
    damaged = Path(save_vae(tmp_path / "damaged", seed=0))
    (damaged / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
    for place, message in (
        ("empty", "no file named config.json found"),
        ("pixels", "holds a PixelAutoencoder, not an AutoencoderKL"),
        ("damaged", "Unable to load weights from checkpoint file"),
    ):
        caplog.clear()
        words = command(drawn_root, tmp_path / "out", "--latents", str(tmp_path / place))
        assert main(words) == main([*words, "--check"]) == 2
        assert message in caplog.text
        assert "the pixel codec of the preset 'tiny' needs no stored latents" in caplog.text
    assert not (tmp_path / "out").exists()


def test_another_vae_is_refused(
    drawn_root: Path, plain: Path, stored: Path, tmp_path: Path, caplog
) -> None:
    other = save_vae(tmp_path / "other", seed=1)
    words = command(drawn_root, stored, "--latents", other)
    assert main(words) == 2
    assert "manifest.json: made with latents = {'vae'" in caplog.text
    assert main(command(drawn_root, stored)) == 2
    assert "now it is None; use the settings of then" in caplog.text
    begun = Path(shutil.copytree(plain, tmp_path / "begun"))
    (begun / "_work/latents").mkdir(parents=True)
    (begun / "_work/latents/settings.json").write_text(json.dumps({"vae": "first"}))
    assert main(command(drawn_root, begun, "--latents", other)) == 2
    assert "settings.json: latents were begun with {'vae': 'first'}" in caplog.text


def test_a_damaged_shard_is_not_encoded(plain: Path, vae: str, tmp_path: Path) -> None:
    output = Path(shutil.copytree(plain, tmp_path / "out"))
    shard = sorted(output.glob("*.tar"))[1]
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    stage = begin_latents(output, vae)
    actor = LatentActor(stage.store, vae)
    failures = [actor(block)["failure"][0].as_py() for block in stage.blocks()]
    (failure,) = filter(None, failures)
    with pytest.raises(LatentError, match=f"{shard}: its sha256 is not the manifest's"):
        raise pickle.loads(failure)


@pytest.mark.slow  # starts actors, which import diffusers
def test_latents_that_are_not_finite_stop_the_job(
    drawn_root: Path, plain: Path, tmp_path: Path, caplog
) -> None:
    output = Path(shutil.copytree(plain, tmp_path / "out"))
    codec = build_codec(SMALL)
    torch.nn.init.constant_(codec.vae.quant_conv.bias, 1e6)
    codec.vae.save_pretrained(tmp_path / "huge")
    assert main(command(drawn_root, output, "--latents", str(tmp_path / "huge"))) == 1
    assert re.search("stopped: .* is not finite in float16.* run the same command", caplog.text)


def test_inspection_understands_latents(stored: Path, vae: str, tmp_path: Path, capsys) -> None:
    page = tmp_path / "report.html"
    assert inspect([str(stored), "--out", str(page)]) == 0
    assert f"<td>Latents</td><td>{vae}</td>" in page.read_text()
    copy = Path(shutil.copytree(stored, tmp_path / "copy"))
    row = pq.read_table(copy / "index.parquet").to_pylist()[0]
    shard = copy / row["shard"]
    data, start = shard.read_bytes(), row["latent_offset"]
    end = start + row["latent_size"]
    infinite = np.float16(np.inf).tobytes()
    for changed, message in (
        (data[: start + 1] + b"?" + data[start + 2 :], "latent.npy is no array of numpy"),
        (data[: end - 2] + infinite + data[end:], "holds numbers that are not finite"),
        (data.replace(b"<f2", b"<i2", 1), "is int16 of shape [8, 12, 10], not float16"),
    ):
        shard.write_bytes(changed)
        capsys.readouterr()
        assert inspect([str(copy), "--verify"]) == 1
        assert f"sample {row['key']}" in (said := capsys.readouterr().out)
        assert message in said
