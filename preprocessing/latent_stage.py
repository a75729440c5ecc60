"""Adds a VAE's latents to a complete shard set: new shards are made aside, then take its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa

from preprocessing.actor_pool import run_actors
from preprocessing.assembly import write_rows
from preprocessing.files import resolve
from preprocessing.job_settings import SettingsError
from preprocessing.latent_actor import LATENTS_FOLDER, LatentActor, record_file
from preprocessing.shard_writer import shard_of_record
from preprocessing.store import Store
from shards.format import (
    INDEX_FILE,
    INDEX_SCHEMA,
    LATENT_SETTINGS,
    MANIFEST_FILE,
    Manifest,
    ShardFile,
    ShardSet,
)

_SETTINGS_FILE = f"{LATENTS_FOLDER}/settings.json"
_NEW_MANIFEST = f"{LATENTS_FOLDER}/{MANIFEST_FILE}"


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
        # Only here and in the actor: diffusers takes seconds, and most jobs do not need it.
        from cfld.codec import CodecConfig, VaeCodec

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
            vae=resolve(vae) if Path(vae).exists() else vae,
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
                name = record_file(shard.name)
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
