"""A model's images of the pairs of a split, and reconstructions of its photos: a file for each."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Generator, Tensor

from cfld.evaluation.photo_source import Pair, PhotoSource, SourceError
from cfld.evaluation.result_files import ResultError, name_of
from cfld.images import encode_png
from cfld.pipeline import CFLDPipeline
from cfld.pipeline_inputs import read_sources
from cfld.pose import draw_pose_map
from cfld.saved_pipeline import load_pipeline, read_index
from cfld.whole_file import whole_file

SETTINGS_FILE = "generation.json"


class GenerationError(ValueError):
    """Images could not be generated; those that were whole are kept."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """All that an image depends on besides its pair."""

    weights_sha256: str
    photos_sha256: str
    scheduler: str
    num_steps: int
    pose_scale: float
    appearance_scale: float
    seed: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class ImageJob:
    """What is to lie in a folder: `images/` of pairs, and `reconstructions/` of targets."""

    folder: Path
    weights: Path
    photos: PhotoSource
    settings: ImageSettings
    pairs: tuple[Pair, ...]
    reconstructed: tuple[str, ...]
    batch_size: int

    def image_path(self, pair: Pair) -> Path:
        """Where the image of a pair lies, under a known name of result sets."""
        return self.folder / "images" / f"{name_of(pair)}.png"

    def reconstruction_path(self, name: str) -> Path:
        """Where the reconstruction of a photo lies."""
        return self.folder / "reconstructions" / f"{name}.png"

    def remaining(self) -> ImageJob:
        """The part of the job that is not done yet, pairs of one source next to each other."""
        return replace(
            self,
            pairs=tuple(p for p in sorted(self.pairs) if not self.image_path(p).is_file()),
            reconstructed=tuple(
                name for name in self.reconstructed if not self.reconstruction_path(name).is_file()
            ),
        )

    def __len__(self) -> int:
        return len(self.pairs) + len(self.reconstructed)


def plan_job(
    folder: Path,
    weights: Path,
    photos: PhotoSource,
    pairs: tuple[Pair, ...],
    settings: ImageSettings,
    *,
    batch_size: int,
    reconstruct: bool,
) -> ImageJob:
    """Return a job for pairs of photos, and for the reconstructions of their targets if wanted.

    Raises:
        SourceError: If a photo or a pose is not at hand.
    """
    if unposed := sorted({target for _, target in pairs} - photos.poses.keys()):
        raise SourceError(
            f"{photos.where}: {len(unposed)} targets have no keypoints, such as {unposed[:3]}; "
            "give a shard set, which holds them"
        )
    if lost := sorted({source for source, _ in pairs} - photos.places.keys()):
        raise SourceError(f"{photos.where}: {len(lost)} sources are missing, such as {lost[:3]}")
    return ImageJob(
        folder=folder,
        weights=weights,
        photos=photos,
        settings=settings,
        pairs=pairs,
        reconstructed=tuple(sorted({target for _, target in pairs})) if reconstruct else (),
        batch_size=batch_size,
    )


def read_identity(weights: Path) -> tuple[str, str]:
    """Return a hash of a pipeline's folder, wherever it lies, and the name of its scheduler.

    Raises:
        WeightsError: If it is no folder of a pipeline.
    """
    scheduler: str = read_index(weights)["scheduler"][1]
    digest = hashlib.sha256()
    for path in sorted(weights.rglob("*")):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.relative_to(weights).as_posix().encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest(), scheduler.removesuffix("Scheduler").lower()


def choose_pairs(pairs: Sequence[Pair], num_pairs: int | None) -> tuple[Pair, ...]:
    """Return so many pairs of all persons, the same at every call; fewer are a part of more."""
    by_hash = sorted(pairs, key=lambda pair: hashlib.sha256(name_of(pair).encode()).digest())
    return tuple(sorted(by_hash[:num_pairs]))


@contextmanager
def reserved(job: ImageJob) -> Iterator[None]:
    """Keep a job's folder to this process, with its settings in a file; also after a kill.

    Raises:
        ResultError: If another process works in the folder, or its images have other settings.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(job.folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResultError(
                f"{job.folder}: another process works here; wait for it or give another --output"
            ) from error
        _keep_settings(job)
        yield
    finally:
        os.close(descriptor)


def make_images(job: ImageJob, device: str, report: Callable[[int], None]) -> None:
    """Make the images of a job, whatever is there; `report` is told how many came to be.

    Raises:
        WeightsError: If the weights can't be used as the settings ask.
        SourceError: If a photo can't be decoded.
        GenerationError: If the memory does not suffice, or images are not finite.
    """
    settings = job.settings
    pipeline = load_pipeline(
        job.weights,
        device=device,
        dtype=settings.dtype,
        scheduler=settings.scheduler,
        num_steps=settings.num_steps,
    )
    pipeline.set_progress_bar_config(disable=True)
    try:
        for pairs in _batches(job.pairs, job.batch_size):
            _save(_generate(pipeline, job, pairs), [job.image_path(pair) for pair in pairs])
            report(len(pairs))
        for names in _batches(job.reconstructed, job.batch_size):
            _save(_reconstruct(pipeline, job, names), list(map(job.reconstruction_path, names)))
            report(len(names))
    except torch.OutOfMemoryError as error:
        raise GenerationError(
            f"out of memory with --batch-size {job.batch_size}: {error}"
        ) from error


def pair_seed(seed: int, pair: Pair) -> int:
    """Return the seed of a pair's noise, which depends on nothing else."""
    digest = hashlib.sha256(f"{seed} {name_of(pair)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes 63 bits


def _generate(
    pipeline: CFLDPipeline, job: ImageJob, pairs: Sequence[Pair]
) -> Float[Tensor, "batch 3 height width"]:
    """The images of pairs in [0, 1], at the model's size; each source is encoded once."""
    model, settings = pipeline.conditioner.settings, job.settings
    sources = list(dict.fromkeys(source for source, _ in pairs))
    seen = pipeline.encode_appearance([job.photos.decode(source) for source in sources])
    rows = [sources.index(source) for source, _ in pairs]
    poses = [job.photos.poses[target] for _, target in pairs]
    height, width = model.image_size
    images: Tensor = pipeline(
        replace(
            seen,
            prompt=seen.prompt[rows],
            biases=tuple(bias[rows] for bias in seen.biases),
            sizes=tuple(seen.sizes[row] for row in rows),
        ),
        [draw_pose_map(pose.keypoints, pose.frame, model.pose_map_size) for pose in poses],
        height=height,
        width=width,
        num_inference_steps=settings.num_steps,
        pose_guidance_scale=settings.pose_scale,
        appearance_guidance_scale=settings.appearance_scale,
        generator=[Generator().manual_seed(pair_seed(settings.seed, pair)) for pair in pairs],
        output_type="pt",
        return_dict=False,
    )[0]
    return images


@torch.no_grad()
def _reconstruct(
    pipeline: CFLDPipeline, job: ImageJob, names: Sequence[str]
) -> Float[Tensor, "batch 3 height width"]:
    """Photos in [0, 1] after the way through the codec and back, without noise."""
    vae = pipeline.vae
    photos = [job.photos.decode(name) for name in names]
    images = read_sources(photos, pipeline.conditioner.settings.image_size)
    latents = vae.encode(images.to(vae.device, vae.dtype), return_dict=False)[0].mode()
    decoded: Tensor = vae.decode(latents, return_dict=False)[0].float()
    return (decoded / 2 + 0.5).clamp(0, 1)


def _save(images: Float[Tensor, "batch 3 height width"], paths: Sequence[Path]) -> None:
    """Write images as PNG, each under its name once it is whole.

    They are rounded to 8 bits at the model's size, so that one set serves scores at several sizes;
    the authors resize first. That moves scored pixels by one grey level at most, PSNR by less than
    0.002 dB and SSIM by less than 0.0003.
    """
    if not images.isfinite().all():
        bad = [p.stem for p, image in zip(paths, images, strict=True) if not image.isfinite().all()]
        raise GenerationError(
            f"{len(bad)} images hold NaN or infinite values, such as {bad[0]}; with --dtype fp16 "
            "try bf16 or fp32, else see whether the training went well"
        )
    pixels = rearrange((images * 255).round().to(torch.uint8), "b c h w -> b h w c").cpu().numpy()
    for path, image in zip(paths, pixels, strict=True):
        with whole_file(path) as unfinished:
            unfinished.write_bytes(encode_png(image))


def _keep_settings(job: ImageJob) -> None:
    path = job.folder / SETTINGS_FILE
    wanted = asdict(job.settings)
    has_images = any(job.folder.glob("*/*.png"))
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        others = [name for name in wanted if found.get(name) != wanted[name]]
        if has_images and others:
            text = ", ".join(f"{name} {found.get(name)} (now {wanted[name]})" for name in others)
            raise ResultError(
                f"{job.folder}: its images were generated with {text}; give another --output"
            )
    elif has_images:
        raise ResultError(
            f"{job.folder}: holds images, but no {SETTINGS_FILE}; give another folder"
        )
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
