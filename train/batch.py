"""Batches: each image once, as the trainer gets them, and how a worker fills one with pixels."""

from __future__ import annotations

import io
import math
import mmap
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float16, Int, Int32, Int64, UInt8
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from cfld.images import ImageError, decode_image, resize_image, resize_steps
from cfld.pose import NUM_JOINTS, POSE_MAP_SIZE, canvas_points, draw_bones
from train.order import pairs_of
from train.pair_table import PairTable, Places
from train.randomness import Stream, uniforms_for
from train.shard_cache import ShardError
from train.shard_files import ShardFiles

Buffer = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch of pairs over distinct samples (images with their pose).

    `source` and `target` say which sample is which pair's. Samples that are a source come first;
    with stored latents only these have an entry in `images`, else all. `draws` name the pairs and
    key their randomness. `flips` says which source conditioning images are mirrored.
    """

    epoch: int
    step: int
    draws: Int64[Tensor, " pairs"]
    source: Int64[Tensor, " pairs"]
    target: Int64[Tensor, " pairs"]
    flips: Bool[Tensor, " pairs"]
    points: Int64[Tensor, "samples 18 2"]
    images: UInt8[Tensor, "images height width 3"]
    latents: Float16[Tensor, "samples moments latent_height latent_width"] | None
    num_sources: int
    pose_map_size: tuple[int, int]
    # Drawn skeletons travel as those of their 8-byte words that are not black, a tenth of all.
    skeleton_places: Int32[Tensor, " drawn"]
    skeleton_words: Int64[Tensor, " drawn"]

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device; the copy of pinned memory does not block."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def source_images(self, size: tuple[int, int]) -> UInt8[Tensor, "pairs {size[0]} {size[1]} 3"]:
        """Return the source conditioning image of each pair, resized and perhaps mirrored.

        On the CPU equal to `cfld.images.resize_image`, elsewhere within a grey level of it.
        """
        images = self.images[: self.num_sources].permute(0, 3, 1, 2)
        for step in resize_steps(self.images.shape[1:3], size):
            images = resize(images, list(step), InterpolationMode.BICUBIC, antialias=True)
        chosen = images.permute(0, 2, 3, 1)[self.source]
        return torch.where(self.flips[:, None, None, None], chosen.flip(2), chosen)

    def skeletons(
        self,
    ) -> UInt8[Tensor, "samples {self.pose_map_size[0]} {self.pose_map_size[1]} 3"]:
        """Return the drawn skeleton of each sample."""
        canvas = torch.zeros(
            len(self.points) * 3 * math.prod(self.pose_map_size) // 8,
            dtype=torch.int64,
            device=self.points.device,
        )
        canvas[self.skeleton_places.long()] = self.skeleton_words
        return canvas.view(torch.uint8).view(-1, *self.pose_map_size, 3)


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The most that a batch can hold."""

    num_pairs: int
    image_size: tuple[int, int]
    latent_shape: tuple[int, int, int] | None
    pose_map_size: tuple[int, int] = POSE_MAP_SIZE

    def __post_init__(self) -> None:
        if math.prod(self.pose_map_size) % 8:
            raise ValueError(
                f"pose_map_size is {list(self.pose_map_size)}; its sides must be multiples of 4"
            )

    @property
    def skeleton_words(self) -> int:
        """8-byte words of one drawn skeleton."""
        return 3 * math.prod(self.pose_map_size) // 8

    def allocate(self) -> Buffer:
        """Allocate memory for one batch that forked processes share.

        It is anonymous: it has no name to outlive a kill, and no limit such as /dev/shm's. Pages
        that no batch touches cost nothing, so drawn skeletons may have room for the worst case.
        """
        samples = 2 * self.num_pairs
        images = self.num_pairs if self.latent_shape else samples
        arrays: list[tuple[str, type, tuple[int, ...]]] = [
            ("images", np.uint8, (images, *self.image_size, 3)),
            ("skeleton_places", np.int32, (samples * self.skeleton_words,)),
            ("skeleton_words", np.int64, (samples * self.skeleton_words,)),
        ]
        if self.latent_shape:
            arrays.append(("latents", np.float16, (samples, *self.latent_shape)))
        return {
            name: np.frombuffer(
                mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize), dtype
            ).reshape(shape)
            for name, dtype, shape in arrays
        }


@dataclass(frozen=True, kw_only=True)
class Filling:
    """A filled buffer's small arrays, and how many entries of each large one count."""

    arrays: dict[str, np.ndarray]
    num_sources: int
    pose_map_size: tuple[int, int]
    used: dict[str, int]


class BatchFiller:
    """Reads and decodes the images of draws into a buffer; works in any process."""

    def __init__(
        self, table: PairTable, files: ShardFiles, shape: BatchShape, *, flip: float, seed: int
    ) -> None:
        self._table = table
        self._files = files
        self._shape = shape
        self._flip = flip
        self._seed = seed
        self._latent_header = b""
        if shape.latent_shape:
            self._latent_header = _npy_header(shape.latent_shape)

    def fill(self, buffer: Buffer, draws: Int64[np.ndarray, " pairs"]) -> Filling:
        """Fill a buffer with the distinct samples of some draws.

        Raises:
            ShardError: If a shard cannot be had whole, or an image in it cannot be decoded.
        """
        table = self._table
        pairs = pairs_of(draws, table.sets)
        sources = np.unique(table.source[pairs])
        others = np.setdiff1d(table.target[pairs], sources)
        rows = np.concatenate([sources, others])
        place = {row: number for number, row in enumerate(rows.tolist())}
        used = {"images": len(sources) if self._shape.latent_shape else len(rows)}
        for number, row in enumerate(rows[: used["images"]].tolist()):
            self._decode(row, buffer["images"][number])
        if self._shape.latent_shape:
            used["latents"] = len(rows)
            for number, row in enumerate(rows.tolist()):
                buffer["latents"][number] = self._latent(row)
        points = self._points(rows)
        used["skeleton_places"] = used["skeleton_words"] = self._draw(buffer, points)
        uniforms = uniforms_for(torch.from_numpy(draws), 1, seed=self._seed, stream=Stream.FLIP)
        arrays = {
            "draws": draws,
            "source": np.array([place[row] for row in table.source[pairs].tolist()], np.int64),
            "target": np.array([place[row] for row in table.target[pairs].tolist()], np.int64),
            "flips": (uniforms[:, 0] < self._flip).numpy(),
            "points": points,
        }
        return Filling(
            arrays=arrays,
            num_sources=len(sources),
            pose_map_size=self._shape.pose_map_size,
            used=used,
        )

    def _decode(self, row: int, out: UInt8[np.ndarray, "height width 3"]) -> None:
        try:
            image = decode_image(self._read(self._table.image, row), out=out)
        except ImageError as error:
            raise ShardError(f"image {self._name(row)} cannot be decoded: {error}") from error
        if not np.may_share_memory(image, out):
            out[:] = resize_image(image, self._shape.image_size)

    def _latent(self, row: int) -> Float16[np.ndarray, "moments height width"]:
        data = self._read(self._table.latent, row)
        header, shape = self._latent_header, self._shape.latent_shape
        assert shape is not None
        if not data.startswith(header) or len(data) != len(header) + 2 * int(np.prod(shape)):
            raise ShardError(f"latent of {self._name(row)} is not float16 of shape {list(shape)}")
        return np.frombuffer(data, np.float16, offset=len(header)).reshape(shape)

    def _draw(self, buffer: Buffer, points: Int[np.ndarray, "samples 18 2"]) -> int:
        """Draw the samples' skeletons as places and values of words; return how many."""
        end = 0
        for number, sample_points in enumerate(points):
            canvas = draw_bones(sample_points, self._shape.pose_map_size)
            words = canvas.reshape(-1).view(np.int64)
            places = np.flatnonzero(words != 0)  # four times as fast as of the words
            start, end = end, end + len(places)
            buffer["skeleton_places"][start:end] = places + number * self._shape.skeleton_words
            buffer["skeleton_words"][start:end] = words[places]
        return end

    def _points(self, rows: Int[np.ndarray, " samples"]) -> Int[np.ndarray, "samples 18 2"]:
        points = np.empty((len(rows), NUM_JOINTS, 2), np.int64)
        keypoints, frames = self._table.keypoints[rows], self._table.frame[rows]
        for height, width in set(map(tuple, frames.tolist())):
            same = (frames == (height, width)).all(axis=1)
            points[same] = canvas_points(
                keypoints[same], (height, width), self._shape.pose_map_size
            )
        return points

    def _read(self, places: Places, row: int) -> bytes:
        shard = int(self._table.row_shard[row])
        return self._files.read(shard, int(places.offset[row]), int(places.size[row]))

    def _name(self, row: int) -> str:
        return f"{self._table.keys[row]} in {self._table.shards[self._table.row_shard[row]].url}"


def take_batch(
    buffer: Buffer, filling: Filling, *, epoch: int, step: int, pin: bool = False
) -> Batch:
    """Copy a batch out of the buffer that it was filled in, to pinned memory if asked for."""
    tensors: dict[str, Any] = {"latents": None}
    for name, array in filling.arrays.items():
        tensors[name] = torch.from_numpy(array)
    for name, num in filling.used.items():
        entries = buffer[name][:num]
        if pin:
            filled = torch.from_numpy(entries)
            tensors[name] = torch.empty_like(filled, pin_memory=True).copy_(filled)
        else:  # numpy asks for huge pages, which take half the time of torch's first touch
            tensors[name] = torch.from_numpy(entries.copy())
    return Batch(
        epoch=epoch,
        step=step,
        num_sources=filling.num_sources,
        pose_map_size=filling.pose_map_size,
        **tensors,
    )


def read_latent_shape(table: PairTable, files: ShardFiles) -> tuple[int, int, int]:
    """Read the shape of the table's stored latents, from that of the first pair.

    Raises:
        ShardError: If they are not three-dimensional float16.
    """
    row = int(table.source[0])
    offset, size = int(table.latent.offset[row]), int(table.latent.size[row])
    latent = np.load(io.BytesIO(files.read(int(table.row_shard[row]), offset, size)))
    if latent.dtype != np.float16 or latent.ndim != 3:
        raise ShardError(
            f"latent of {table.keys[row]} is {latent.dtype} of shape {list(latent.shape)}, not "
            "float16 of shape [moments, height, width]"
        )
    return latent.shape


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """Return how numpy begins the file of a float16 array of this shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f2", "fortran_order": False, "shape": shape}
    )
    return file.getvalue()
