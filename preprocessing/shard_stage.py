"""Makes one shard: reads, resizes, encodes and packs its photos in one task, with their records."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32
from PIL import Image

from cfld.images import (
    ImageError,
    Subsampling,
    decode_image,
    encode_drawing,
    encode_jpeg,
    resize_image,
)
from cfld.pose import MISSING_JOINT, draw_skeleton, is_found
from preprocessing.listing import Reject
from preprocessing.pairs import UNPAIRABLE
from preprocessing.photo_reader import read_ahead
from preprocessing.rejects import rejects_table
from preprocessing.shard_writer import ShardWriter, write_record
from preprocessing.store import WORK_FOLDER, Store
from shards.format import (
    INDEX_SCHEMA,
    NUM_JOINTS,
    POSE_SIZE,
    SAMPLE_FIELDS,
    member_name,
)

RECORDS_FOLDER = f"{WORK_FOLDER}/shards"

SHOULDERS_AND_HIPS = (2, 5, 8, 11)
_FINE_COLOUR_BELOW = 256

# Of a frame's side. Pose networks place a joint at the edge up to a cell, 2 to 4 %, beyond it; what
# lies further out was meant for another frame, or guessed.
_OUTSIDE_TOLERANCE = 0.05

# A photo as this stage needs it. Keypoints refer to a frame (height, width), null: the photo's own.
PHOTO_COLUMNS = (
    "path", "key", "name", "person", "split", "view", "is_pairable",
    "keypoints", "frame_height", "frame_width", "num_people",
)  # fmt: skip

# The rows of the index, and what the rejects table needs of them.
RECORD_SCHEMA = INDEX_SCHEMA.append(pa.field("path", pa.string())).append(
    pa.field("invalid_reason", pa.string())
)


@dataclass(frozen=True, kw_only=True)
class ShardOrder:
    """What to make: the shard's name and how to store images; `image_size` None keeps the files."""

    name: str
    split: str
    dataset: str
    image_size: tuple[int, int] | None
    jpeg_quality: int


@dataclass(frozen=True)
class StoredImage:
    """An image as it goes into the tar, its own size and the size of the photo it came from."""

    data: bytes
    extension: str
    size: tuple[int, int]
    photo_size: tuple[int, int]


def build_shard(store: Store, order: ShardOrder, photos: pa.Table) -> int:
    """Write a shard, then its record, whose existence says "done"; return the number of images.

    Photos that cannot be read are left out and noted. `photos` has the `PHOTO_COLUMNS`.
    """
    rows: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    paths = photos["path"].to_pylist()
    with store.new_file(order.name) as file, ShardWriter(file) as tar:
        for data, photo in zip(read_ahead(paths), photos.to_pylist(), strict=True):
            image = _try_to_store(data, order)
            if isinstance(image, ImageError):
                rejects.append(_reject(photo, image))
            else:
                rows.append(_add_sample(tar, order, photo, image))
        shard = tar.finish(order.name, order.split, len(rows))
    store.write_table(rejects_file(order.name), rejects_table(rejects))
    write_record(store, record_file(order.name), rows, RECORD_SCHEMA, shard)
    return len(rows)


def record_file(shard: str) -> str:
    """Return where a finished shard's index rows are kept until all shards are finished."""
    return f"{RECORDS_FOLDER}/{shard}.parquet"


def rejects_file(shard: str) -> str:
    """Return where a finished shard's rejects are kept until all shards are finished."""
    return f"{RECORDS_FOLDER}/{shard}.rejects.parquet"


def store_image(data: Future[bytes], order: ShardOrder) -> StoredImage:
    """Bring a photo's file into the form that the order asks for.

    Raises:
        ImageError: If the file cannot be read or decoded.
    """
    encoded = data.result()
    photo = decode_image(encoded)
    height, width, _ = photo.shape
    if order.image_size is None:
        return StoredImage(encoded, _extension(encoded), (height, width), (height, width))
    image = resize_image(photo, order.image_size)
    # In a small picture halved colour would blur what is only a few pixels wide.
    subsampling: Subsampling = "444" if max(order.image_size) < _FINE_COLOUR_BELOW else "420"
    jpeg = encode_jpeg(image, order.jpeg_quality, subsampling)
    return StoredImage(jpeg, "jpg", order.image_size, (height, width))


def scale_keypoints(
    keypoints: Float32[np.ndarray, "*batch 18 3"], old: tuple[int, int], new: tuple[int, int]
) -> Float32[np.ndarray, "*batch 18 3"]:
    """Bring keypoints from one (height, width) frame to another as `x * new / old`.

    Multiplied first, in float64, and rounded to float32 once: a coordinate that falls on a whole
    pixel of the pose map falls on it again, where truncation would turn 15.999 into 15.
    """
    scaled = keypoints.astype(np.float64)
    scaled[..., :2] = scaled[..., :2] * (new[1], new[0]) / (old[1], old[0])
    return scaled.astype(np.float32)


def lies_outside(
    keypoints: Float32[np.ndarray, "18 3"], frame: tuple[int, int]
) -> Bool[np.ndarray, " 18"]:
    """Tell which joints lie outside of the frame (height, width) by more than 5 % of its side."""
    sides = np.array(frame[::-1])
    margin = _OUTSIDE_TOLERANCE * sides
    distance = np.abs(keypoints[:, :2] - (sides - 1) / 2)  # from the centre
    return np.any(distance > (sides - 1) / 2 + margin, axis=1)


def explain_invalid(photo: Mapping[str, Any], frame: tuple[int, int]) -> str | None:
    """Return why a photo whose keypoints refer to a frame may stand in no pair, None if it may."""
    if not photo["is_pairable"]:
        return UNPAIRABLE
    if photo["keypoints"] is None:
        return "no_keypoints"
    keypoints, needed = _keypoints(photo), list(SHOULDERS_AND_HIPS)
    found, is_outside = is_found(keypoints), lies_outside(keypoints, frame)
    if not found.any():
        return "no_person"
    if is_outside[needed].any():  # of other joints some estimators guess where they would be
        return "keypoints_outside"
    return None if found[needed].all() else "too_few_joints"


def _try_to_store(data: Future[bytes], order: ShardOrder) -> StoredImage | ImageError:
    try:
        return store_image(data, order)
    except ImageError as error:
        return error


def _reject(photo: Mapping[str, Any], error: ImageError) -> Reject:
    return Reject(
        path=photo["path"],
        stage="shards",
        reason=error.reason,
        detail=error.detail,
        name=photo["name"],
    )


def _add_sample(
    tar: ShardWriter, order: ShardOrder, photo: dict[str, Any], image: StoredImage
) -> dict[str, Any]:
    """Append a sample's members to the tar; return its row of the record."""
    given = (photo["frame_height"], photo["frame_width"])
    frame = image.photo_size if None in given else given
    keypoints = _keypoints(photo)
    keypoints[lies_outside(keypoints, frame)] = MISSING_JOINT  # nobody could draw them
    keypoints = scale_keypoints(keypoints, frame, image.size)
    invalid_reason = explain_invalid(photo, frame)
    row = photo | {
        "dataset": order.dataset,
        "height": image.size[0],
        "width": image.size[1],
        "photo_height": image.photo_size[0],
        "photo_width": image.photo_size[1],
        "is_valid": invalid_reason is None,
        "keypoints": _jsonable(keypoints),
    }
    members = {
        "image": image.data,
        "pose": encode_drawing(draw_skeleton(keypoints, image.size, POSE_SIZE)),
        "json": _to_json({name: row[name] for name in SAMPLE_FIELDS}).encode(),
    }
    row |= {"latent_offset": None, "latent_size": None}
    for member, data in members.items():
        name = member_name(row["key"], member, image.extension)
        row[f"{member}_offset"], row[f"{member}_size"] = tar.add(name, data)
    return row | {
        "shard": order.name,
        "image_extension": image.extension,
        "keypoints": keypoints.ravel(),
        "invalid_reason": invalid_reason,
    }


def _keypoints(photo: Mapping[str, Any]) -> Float32[np.ndarray, "18 3"]:
    if photo["keypoints"] is None:
        return np.full((NUM_JOINTS, 3), MISSING_JOINT, np.float32)
    return np.array(photo["keypoints"], np.float32).reshape(NUM_JOINTS, 3)


def _jsonable(keypoints: Float32[np.ndarray, "18 3"]) -> list[list[float | None]]:
    """Return numbers whose shortest decimal form gives back the same float32, null for NaN."""
    return [
        [None if np.isnan(number) else float(str(number)) for number in joint]
        for joint in keypoints
    ]


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _extension(data: bytes) -> str:
    """Return the usual extension of an image file's true format, whatever its name says."""
    if data.startswith(b"\xff\xd8"):
        return "jpg"
    with Image.open(io.BytesIO(data)) as image:
        return "tif" if image.format == "TIFF" else f"{image.format}".lower()
