"""What a job makes, resolved and comparable: kept in the work folder and in the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from preprocessing.datasets import DATASETS
from preprocessing.files import resolve
from preprocessing.listing import Annotations
from shards.format import sha256_of

ORIGINAL = "original"
UNTOUCHED_SPLIT = "test"  # its photos are the ground truth of scores


class SettingsError(ValueError):
    """Input or settings that cannot be used, found before work starts."""


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """What to make from what. How fast (workers, cluster) is no part of it: it changes nothing.

    An image size is (height, width), None keeps the photo's file as it is. `keypoints` are files
    in a format of `cfld.keypoints` that refer to `keypoints_frame`; None means each image itself,
    but for csv files of a dataset that publishes such in a frame (`with_published_files`). `pairs`
    maps a split to a `from,to` csv. `pose_network` is what `PoseEstimatorConfig.network` says, None
    for its default. `limit` counts photos, `seed` chooses. `latents` is the folder or hub name of a
    VAE.
    """

    dataset: str
    root: str
    output: str
    image_size: tuple[int, int] | None = (512, 512)
    test_image_size: tuple[int, int] | None = None
    jpeg_quality: int = 95
    shard_size_bytes: int = 64_000_000
    splits: tuple[str, ...] | None = None
    limit: int | None = None
    seed: int = 0
    keypoints: tuple[str, ...] = ()
    keypoints_frame: tuple[int, int] | None = None
    pairs: Mapping[str, str] | None = None
    pose_network: str | None = None
    latents: str | None = None

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise SettingsError(f"dataset {self.dataset!r}: choose one of {sorted(DATASETS)}")
        if not 1 <= self.jpeg_quality <= 100:
            raise SettingsError(f"JPEG quality {self.jpeg_quality}: must lie in 1..100")
        if self.shard_size_bytes < 1:
            raise SettingsError(f"shard size {self.shard_size_bytes} bytes: must be positive")
        if self.limit is not None and self.limit < 1:
            raise SettingsError(f"limit {self.limit}: at least one photo is needed")
        for size in (self.image_size, self.test_image_size, self.keypoints_frame):
            if size is not None and min(size) < 1:
                raise SettingsError(f"size {size}: height and width must be positive")
        if self.latents is not None and not self.latent_image_sizes:
            raise SettingsError(
                "latents: they are stored of images of one size, but these are kept as they are; "
                "give --image-size HEIGHT WIDTH"
            )

    def image_size_of(self, split: str) -> tuple[int, int] | None:
        """Return the size that images of a split are stored in, None for photos as they are."""
        return self.test_image_size if split == UNTOUCHED_SPLIT else self.image_size

    @property
    def latent_image_sizes(self) -> set[tuple[int, int]]:
        """The sizes of images of which latents may be stored: photos as they are have none."""
        return {size for size in (self.image_size, self.test_image_size) if size is not None}

    def record(self) -> dict[str, Any]:
        """Return what the manifest keeps: all but the output's place, files with their hashes.

        Other spellings of one place or choice give the same record. Latents, which are added to a
        complete set, bring their own.
        """
        record = asdict(self)
        del record["output"], record["latents"]
        for name in ("image_size", "test_image_size"):
            record[name] = record[name] or ORIGINAL
        record["root"] = resolve(self.root)
        record["splits"] = self.splits and sorted(set(self.splits))
        record["keypoints"] = _hashes(self.keypoints)
        record["pairs"] = {split: _hashes([path]) for split, path in (self.pairs or {}).items()}
        if self.pose_network is not None and Path(self.pose_network).is_file():
            record["pose_network"] = _hashes([self.pose_network])
        return {name: _as_json(value) for name, value in record.items()}


def require_access(url: str) -> None:
    """Try whether a store can be asked at all, whether or not there is anything yet.

    Raises:
        SettingsError: If it cannot: an unknown protocol, a package or credentials that are missing.
    """
    try:
        fs, path = url_to_fs(url)
        fs.exists(path)
    except Exception as error:  # each kind of store has its own
        raise SettingsError(
            f"{url}: cannot be reached ({type(error).__name__}: {error}); check the address, the "
            "credentials, and that the package for this kind of store is installed"
        ) from error


def explain(error: Exception) -> str:
    """Return what an error says; of one of the operating system the file, and what to look at."""
    if isinstance(error, OSError) and error.filename is not None:
        return (
            f"{error.filename}: {error.strerror}; check the path, and that this user may read it "
            "(in the output: write)"
        )
    return str(error)


def with_published_files(settings: JobSettings) -> JobSettings:
    """Fill in the published keypoints and pairs that lie in the root, unless others were asked for.

    A pose network that was asked for wins over published keypoints. A csv refers to the frame that
    the dataset's are published in, wherever it lies, unless another frame was asked for.

    Raises:
        SettingsError: If a frame was asked for and there are no keypoints, or it is unclear which.
        FileNotFoundError: If the root is not this dataset.
    """
    found: Annotations = DATASETS[settings.dataset].find_annotations(settings.root)
    if settings.pairs is None:
        settings = replace(settings, pairs=dict(found.pairs))
    if not settings.keypoints and settings.pose_network is None:
        settings = replace(settings, keypoints=found.keypoints)
    if settings.keypoints_frame is not None and not settings.keypoints:
        raise SettingsError(
            f"--keypoints-frame {settings.keypoints_frame}: no keypoint file is read, and other "
            "keypoints refer to each photo; leave it out or give --keypoints"
        )
    kinds = {path.lower().endswith(".csv") for path in settings.keypoints}
    if settings.keypoints_frame is None and found.frame is not None and True in kinds:
        if False in kinds:
            raise SettingsError(
                f"--keypoints: csv files of {settings.dataset} refer to {found.frame}, others to "
                "each photo; give --keypoints-frame HEIGHT WIDTH for all of them"
            )
        settings = replace(settings, keypoints_frame=found.frame)
    return settings


def _hashes(paths: Iterable[str]) -> dict[str, str]:
    hashes = {}
    for path in paths:
        fs, local = url_to_fs(path)
        try:
            hashes[resolve(path)] = sha256_of(fs, local)
        except FileNotFoundError as error:
            raise SettingsError(f"{path}: there is no such file") from error
    return hashes


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
