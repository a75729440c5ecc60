"""Adds a VAE's latents to a complete shard set: new shards are made aside, then take its place."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float16, UInt8

from cfld.images import decode_image, to_floats
from preprocessing.actor_pool import answer, run_actors
from preprocessing.assembly import write_rows
from preprocessing.job_settings import SettingsError
from preprocessing.shard_stage import shard_of_record
from preprocessing.shard_writer import TarWriter
from preprocessing.store import WORK_FOLDER, OutputError, Store
from shards.format import (
    INDEX_FILE,
    INDEX_SCHEMA,
    LATENT_SETTINGS,
    MANIFEST_FILE,
    Manifest,
    ShardFile,
    ShardSet,
    member_name,
)

LATENTS_FOLDER = f"{WORK_FOLDER}/latents"

_SETTINGS_FILE = f"{LATENTS_FOLDER}/settings.json"
_NEW_MANIFEST = f"{LATENTS_FOLDER}/{MANIFEST_FILE}"
_COPIED = ("image", "pose", "json")
_NUM_ENCODED_TOGETHER = 16


class LatentError(RuntimeError):
    """Latents that cannot be made, of a shard that is damaged or an image the VAE fails on."""


@dataclass(frozen=True, kw_only=True)
class LatentSettings:
    """Whose latents a set stores; kept in its manifest, so that a trainer can refuse another's.

    `sha256` is that of the encoder's weights (`VaeCodec.hash_encoder`); a latent is an array of
    `channels`, and of the image's height and width over `factor`.
    """

    vae: str
    sha256: str
    scaling_factor: float
    channels: int
    factor: int

    @classmethod
    def of(cls, vae: str, image_sizes: Collection[tuple[int, int]]) -> LatentSettings:
        """Load a VAE, and describe what it makes of images of these sizes.

        Raises:
            SettingsError: If there is no VAE, or a size is no multiple of its factor.
        """
        from cfld.codec import (
            CodecConfig,
            VaeCodec,
        )  # diffusers takes seconds, and is rarely needed

        try:
            codec = VaeCodec(CodecConfig(pretrained=vae))
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"latents: no VAE can be loaded: {str(error).splitlines()[0]}. Give the folder or "
                f"hub name of a diffusers AutoencoderKL, or of a pipeline with one, not {vae}; the "
                "pixel codec of the preset 'tiny' needs no stored latents"
            ) from error
        config = codec.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        for size in image_sizes:
            if any(side % factor for side in size):
                raise SettingsError(
                    f"latents: image size {size[0]} {size[1]} is no multiple of {factor}, which "
                    f"the VAE at {vae} needs; choose another --image-size"
                )
        return cls(
            vae=vae,
            sha256=codec.hash_encoder(),
            scaling_factor=config.scaling_factor,
            channels=2 * config.latent_channels,
            factor=factor,
        )

    def num_bytes(self, image_size: tuple[int, int]) -> int:
        """Return how much an image's latent takes in a shard, without its tar header."""
        height, width = image_size
        return 2 * self.channels * (height // self.factor) * (width // self.factor)


@dataclass(frozen=True)
class LatentStage:
    """The work on one complete set; shards of other `splits` stay as they are."""

    store: Store
    manifest: Manifest
    settings: LatentSettings
    splits: Collection[str]

    def begin(self) -> None:
        """Keep the settings, or find those that an earlier start kept.

        Raises:
            SettingsError: If it was begun with another VAE.
        """
        wanted = asdict(self.settings)
        if not self.store.exists(_SETTINGS_FILE):
            self.store.write_bytes(_SETTINGS_FILE, json.dumps(wanted, indent=2).encode())
        found = json.loads(self.store.read_bytes(_SETTINGS_FILE))
        if found != wanted:
            raise SettingsError(
                f"{self.store.url(_SETTINGS_FILE)}: latents were begun with {found}, now it is "
                f"{wanted}; use the VAE of then, or remove {self.store.url(LATENTS_FOLDER)}"
            )

    @property
    def shards(self) -> list[ShardFile]:
        """The shards that get latents."""
        return [shard for shard in self.manifest.shards if shard.split in self.splits]

    def pending(self) -> list[ShardFile]:
        """Return those of them that have none yet."""
        finished = set(self.store.names(LATENTS_FOLDER))
        return [shard for shard in self.shards if f"{shard.name}.parquet" not in finished]

    def encode(self, num_workers: int, advance: Callable[[int], object]) -> None:
        """Make the pending shards on an actor pool; index rows go out, counts come back.

        Raises:
            LatentError: If a shard is not what the manifest says, or a latent would not be finite.
            OutputError: If the output cannot be written.
        """
        arguments = (self.store, self.settings.vae)
        run_actors(LatentActor, arguments, self.blocks(), num_workers, advance, use_gpus=True)

    def blocks(self) -> list[pa.Table]:
        """Return what actors need: the index rows of each pending shard, and its hash."""
        pending = {shard.name: shard.sha256 for shard in self.pending()}
        return [
            rows.append_column("sha256", pa.repeat(pending[shard.name], rows.num_rows))
            for shard, rows in self._index()
            if shard.name in pending and rows.num_rows
        ]

    def finish(self) -> Manifest:
        """Make index and manifest of the finished shards, and put all in the set's place."""
        shards = []

        def rows() -> Iterator[pa.Table]:
            for shard, old in self._index():
                name = _record_file(shard.name)
                if shard.split in self.splits and old.num_rows:
                    record = self.store.read_table(name)
                    shards.append(shard_of_record(record))
                    yield record.replace_schema_metadata()
                else:
                    shards.append(shard)
                    yield old

        index = write_rows(self.store, f"{LATENTS_FOLDER}/{INDEX_FILE}", rows(), INDEX_SCHEMA)
        index = replace(index, name=INDEX_FILE)
        tables = (index, *(t for t in self.manifest.tables if t.name != INDEX_FILE))
        settings = {**self.manifest.settings, LATENT_SETTINGS: asdict(self.settings)}
        manifest = replace(self.manifest, settings=settings, shards=tuple(shards), tables=tables)
        self.store.write_bytes(_NEW_MANIFEST, manifest.to_json().encode())
        publish_latents(self.store)
        return manifest

    def _index(self) -> Iterator[tuple[ShardFile, pa.Table]]:
        """Yield each shard with its rows of the index, which lie together and in its order."""
        files = ShardSet(fs=self.store.fs, root=self.store.root, manifest=self.manifest)
        index, start = files.read_index(), 0
        for shard in self.manifest.shards:
            yield shard, index.slice(start, shard.num_images).combine_chunks()
            start += shard.num_images


def publish_latents(store: Store) -> None:
    """Put finished shards with latents in the set's place; also goes on with what was begun.

    While that lasts there is no manifest, so nobody takes the set for complete.
    """
    if not store.exists(_NEW_MANIFEST):
        return
    store.remove(MANIFEST_FILE)
    for name in store.names(LATENTS_FOLDER):
        if name.endswith(".tar") or name == INDEX_FILE:
            store.move(f"{LATENTS_FOLDER}/{name}", name)
    store.move(_NEW_MANIFEST, MANIFEST_FILE)


class LatentActor:
    """Holds a VAE; writes each shard once more, with latents, and the rows of its index."""

    def __init__(self, store: Store, vae: str) -> None:
        from cfld.codec import CodecConfig, VaeCodec

        self._store = store
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._codec = VaeCodec(CodecConfig(pretrained=vae)).to(self._device)
        if self._device.type == "cuda":
            self._codec.vae.disable_slicing()  # which would encode one image at a time
            torch.backends.cudnn.deterministic = True
        else:
            torch.set_num_threads(1)  # the workers share the cores

    def __call__(self, block: pa.Table) -> pa.Table:
        """Process the rows of one shard; processing them again leaves the same files."""
        return answer(self._process, block, (OutputError, LatentError))

    def _process(self, block: pa.Table) -> None:
        rows = block.to_pylist()
        name, expected = rows[0]["shard"], rows[0]["sha256"]
        data = self._store.read_bytes(name)
        if hashlib.sha256(data).hexdigest() != expected:
            raise LatentError(
                f"{self._store.url(name)}: its sha256 is not the manifest's; find what is damaged "
                "with 'python -m preprocessing.inspect_shards --verify', and build it again"
            )
        with (
            self._store.new_file(f"{LATENTS_FOLDER}/{name}") as file,
            TarWriter(file) as tar,
        ):
            latents = self._encode(data, rows)
            written = [
                _add_sample(tar, data, row, latent)
                for row, latent in zip(rows, latents, strict=True)
            ]
        shard = ShardFile(
            name=name,
            split=rows[0]["split"],
            num_images=len(rows),
            size_bytes=tar.size_bytes,
            sha256=tar.sha256,
        )
        schema = INDEX_SCHEMA.with_metadata({"shard": json.dumps(asdict(shard))})
        self._store.write_table(_record_file(name), pa.Table.from_pylist(written, schema))

    def _encode(
        self, data: bytes, rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[Float16[np.ndarray, "channels height width"]]:
        """Yield the latent of each row; the next images are decoded meanwhile."""
        groups = [
            rows[start : start + _NUM_ENCODED_TOGETHER]
            for start in range(0, len(rows), _NUM_ENCODED_TOGETHER)
        ]
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(_decode, data, groups[0])
            for number, group in enumerate(groups):
                images = torch.from_numpy(following.result()).to(self._device)
                if number + 1 < len(groups):
                    following = pool.submit(_decode, data, groups[number + 1])
                moments = self._codec.moments(to_floats(images))
                latents = moments.to("cpu", torch.float16).numpy()
                for row, latent in zip(group, latents, strict=True):
                    if not np.isfinite(latent).all():
                        raise LatentError(
                            f"{row['shard']}: the latent of {row['key']} is not finite in float16; "
                            "is this VAE meant for other values than [-1, 1]?"
                        )
                    yield latent


def _decode(
    data: bytes, rows: Sequence[Mapping[str, Any]]
) -> UInt8[np.ndarray, "batch height width 3"]:
    return np.stack([decode_image(_member(data, row, "image")) for row in rows])


def _add_sample(
    tar: TarWriter,
    data: bytes,
    row: Mapping[str, Any],
    latent: Float16[np.ndarray, "channels height width"],
) -> dict[str, Any]:
    """Append a sample's members and its latent to the tar; return its row of the index."""
    file = io.BytesIO()
    np.save(file, latent)
    members = {member: _member(data, row, member) for member in _COPIED}
    places: dict[str, int] = {}
    for member, content in (members | {"latent": file.getvalue()}).items():
        name = member_name(row["key"], member, row["image_extension"])
        places[f"{member}_offset"], places[f"{member}_size"] = tar.add(name, content)
    return {**row, **places}


def _member(data: bytes, row: Mapping[str, Any], member: str) -> bytes:
    offset = row[f"{member}_offset"]
    return data[offset : offset + row[f"{member}_size"]]


def _record_file(shard: str) -> str:
    return f"{LATENTS_FOLDER}/{shard}.parquet"
