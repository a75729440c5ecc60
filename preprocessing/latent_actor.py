"""Encodes the images of one shard by a VAE, and writes the shard once more with their latents."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float16, UInt8

from cfld.images import decode_image, to_floats
from preprocessing.actor_pool import answer
from preprocessing.shard_writer import ShardWriter, write_record
from preprocessing.store import WORK_FOLDER, OutputError, Store
from shards.format import INDEX_SCHEMA, member_name

LATENTS_FOLDER = f"{WORK_FOLDER}/latents"

_COPIED = ("image", "pose", "json")
_NUM_ENCODED_TOGETHER = 8


class LatentError(RuntimeError):
    """Latents that cannot be made, of a shard that is damaged or an image the VAE fails on."""


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
            ShardWriter(file) as tar,
        ):
            latents = self._encode(data, rows)
            written = [
                _add_sample(tar, data, row, latent)
                for row, latent in zip(rows, latents, strict=True)
            ]
            shard = tar.finish(name, rows[0]["split"], len(rows))
        write_record(self._store, record_file(name), written, INDEX_SCHEMA, shard)

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


def record_file(shard: str) -> str:
    """Return where a finished shard's index rows are kept until all shards are finished."""
    return f"{LATENTS_FOLDER}/{shard}.parquet"


def _decode(
    data: bytes, rows: Sequence[Mapping[str, Any]]
) -> UInt8[np.ndarray, "batch height width 3"]:
    return np.stack([decode_image(_member(data, row, "image")) for row in rows])


def _add_sample(
    tar: ShardWriter,
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
