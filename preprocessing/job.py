"""The whole job: listing, keypoints, shards, pairs, latents; goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.exceptions import RayTaskError

from cfld.pose_network import PoseEstimator, PoseEstimatorConfig
from preprocessing.assembly import assemble
from preprocessing.earlier_work import SETTINGS_FILE, find_finished, require_ours, tidied
from preprocessing.job_settings import (
    JobSettings,
    SettingsError,
    require_access,
    with_published_files,
)
from preprocessing.keypoint_stage import (
    FoundKeypoints,
    count_finished,
    estimate_keypoints,
    read_estimates,
)
from preprocessing.latent_actor import LATENTS_FOLDER
from preprocessing.latent_stage import LatentSettings, LatentStage, publish_latents
from preprocessing.listing_stage import PhotoListing, list_selected
from preprocessing.photo_reader import PhotoStoreError
from preprocessing.progress import Progress
from preprocessing.published_keypoints import KEYPOINTS_SCHEMA, read_published
from preprocessing.ray_session import ray_session
from preprocessing.rejects import rejects_table
from preprocessing.shard_plan import PlannedShard, plan_shards
from preprocessing.shard_stage import (
    PHOTO_COLUMNS,
    RECORDS_FOLDER,
    ShardOrder,
    build_shard,
    record_file,
)
from preprocessing.store import Store
from shards.format import LATENT_SETTINGS, Manifest

_MAX_RETRIES = 5  # of a shard whose worker died, or whose photos' store failed
_PATIENCE_S = 10.0  # with tasks under way when the job stops


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What the job left, and the seconds of each stage; none if there was nothing to do."""

    manifest: Manifest
    seconds: Mapping[str, float]


def run_job(
    settings: JobSettings, *, num_workers: int | None = None, ray_address: str | None = None
) -> JobResult:
    """Make a shard set, or what is missing of it.

    The result does not depend on how many workers there are, nor on how often it was stopped.

    Raises:
        SettingsError: If input or settings cannot be used, or the output was made with others.
        OSError, FormatError, KeypointsError, PoseNetworkError: Likewise; they say of what file.
        OutputError: If the output cannot be written; what is finished is kept.
        NoImagesError: If not one photo can be stored.
        LatentError: If there is an image whose latent cannot be made.
    """
    if num_workers is not None and num_workers < 1:
        raise SettingsError(f"workers {num_workers}: at least one is needed")
    for url in (settings.root, settings.output):
        require_access(url)
    store, progress = Store.open(settings.output), Progress()
    publish_latents(store)
    require_ours(store)
    with tidied(store), ExitStack() as stack:
        start_ray = cache(lambda: stack.enter_context(ray_session(ray_address, num_workers)))
        named_splits = frozenset(settings.pairs or ())
        settings = with_published_files(settings)
        latents = None
        if settings.latents is not None:
            latents = LatentSettings.of(settings.latents, settings.latent_image_sizes)
        manifest = find_finished(store, settings, latents)
        if manifest is None:
            manifest = _Job(settings, named_splits, store, progress, start_ray).run()
        if latents is not None and LATENT_SETTINGS not in manifest.settings:
            splits = {s for s in manifest.counts if settings.image_size_of(s) is not None}
            stage = LatentStage(store, manifest, latents, splits)
            manifest = _add_latents(stage, progress, start_ray)
    if latents is not None or not store.names(LATENTS_FOLDER):
        store.remove_work()  # but for latents that were begun, and are not asked for now
    return JobResult(manifest=manifest, seconds=progress.seconds)


@dataclass(frozen=True)
class _Job:
    """A job under way; `start_ray` starts Ray when it is first needed, and gives its workers.

    `named_splits` are those of pair lists that were given, not found in the root.
    """

    settings: JobSettings
    named_splits: Set[str]
    store: Store
    progress: Progress
    start_ray: Callable[[], int]

    def run(self) -> Manifest:
        with self.progress.stage("listing"):
            listing = PhotoListing.load(self.store) or self._list()
        photos = listing.photos
        keypoints, keypoint_rejects = self._find_keypoints(listing)
        num_bytes = photos["estimated_bytes"].to_numpy()
        plan = list(plan_shards(photos, num_bytes, self.settings.shard_size_bytes))
        self._make_shards(photos, keypoints, plan)
        with self.progress.stage("index and pairs"):
            names = [shard.name for shard in plan]
            return assemble(self.store, names, self.settings, listing, keypoint_rejects)

    def _list(self) -> PhotoListing:
        listing = list_selected(self.settings)
        splits = listing.photos["split"].unique().to_pylist()
        if unknown := self.named_splits - set(splits):
            raise SettingsError(f"--pairs {min(unknown)}=…: there are photos of {splits} only")
        record = json.dumps(self.settings.record(), indent=2)
        self.store.write_bytes(SETTINGS_FILE, record.encode())
        listing.save(self.store)
        return listing

    def _find_keypoints(self, listing: PhotoListing) -> tuple[FoundKeypoints, pa.Table]:
        """Return what was found, and the rejects of this stage."""
        photos = listing.photos
        found, rejects = KEYPOINTS_SCHEMA.empty_table(), rejects_table(())
        missing = photos.filter(pc.is_null(photos["keypoints"])).combine_chunks()
        if self.settings.keypoints:
            with self.progress.stage("keypoints"):
                found, rejects = read_published(
                    self.settings.keypoints,
                    self.settings.keypoints_frame,
                    photos["name"].combine_chunks(),
                    listing.unselected,
                )
            is_there = pc.is_in(missing["name"], found["name"].combine_chunks())
            missing = missing.filter(pc.invert(is_there)).combine_chunks()
        if missing.num_rows and (self.settings.pose_network or not self.settings.keypoints):
            self._estimate(missing.select(["name", "path"]))
            found = pa.concat_tables([found, read_estimates(self.store)])
        keypoints = FoundKeypoints.of(photos, found)
        return keypoints, pa.concat_tables([rejects, keypoints.rejects(photos)])

    def _estimate(self, photos: pa.Table) -> None:
        finished = count_finished(photos.num_rows, self.store)
        if finished == photos.num_rows:
            return
        # One thread each: the workers share the cores, and results are the same for any number.
        config = PoseEstimatorConfig(num_threads=1)
        if self.settings.pose_network is not None:
            config = replace(config, network=self.settings.pose_network)
        PoseEstimator(config)  # a network that cannot be had is noticed before work starts
        num_workers = self.start_ray()
        with self.progress.stage("keypoints", photos.num_rows, finished) as bar:
            estimate_keypoints(photos, self.store, config, num_workers, bar.update)

    def _make_shards(
        self, photos: pa.Table, keypoints: FoundKeypoints, plan: Sequence[PlannedShard]
    ) -> None:
        finished = {f"{RECORDS_FOLDER}/{name}" for name in self.store.names(RECORDS_FOLDER)}
        pending = [shard for shard in plan if record_file(shard.name) not in finished]
        if not pending:
            return
        num_workers = self.start_ray()
        num_done = photos.num_rows - sum(shard.num_photos for shard in pending)
        with self.progress.stage("shards", photos.num_rows, num_done) as bar:
            running: dict[ray.ObjectRef, int] = {}
            try:
                for task, num_photos in self._submit(photos, keypoints, pending):
                    running[task] = num_photos
                    if len(running) >= num_workers:
                        bar.update(_wait_for_one(running))
                while running:
                    bar.update(_wait_for_one(running))
            finally:
                # Cancelling would be quicker, but a task that ends in that very moment makes Ray
                # end this process. What they finish is kept.
                if running:
                    ray.wait(list(running), num_returns=len(running), timeout=_PATIENCE_S)

    def _submit(
        self, photos: pa.Table, keypoints: FoundKeypoints, pending: Sequence[PlannedShard]
    ) -> Iterator[tuple[ray.ObjectRef, int]]:
        """Start the task of each shard when the next is asked for; yield it and its size."""
        task = ray.remote(build_shard).options(
            num_cpus=1, max_retries=_MAX_RETRIES, retry_exceptions=[PhotoStoreError]
        )
        for shard in pending:
            order = ShardOrder(
                name=shard.name,
                split=shard.split,
                dataset=self.settings.dataset,
                image_size=self.settings.image_size_of(shard.split),
                jpeg_quality=self.settings.jpeg_quality,
            )
            rows = keypoints.join(photos, shard.start, shard.num_photos)
            rows = rows.select(PHOTO_COLUMNS).combine_chunks()
            yield task.remote(self.store, order, rows), shard.num_photos


def _add_latents(stage: LatentStage, progress: Progress, start_ray: Callable[[], int]) -> Manifest:
    stage.begin()
    total = sum(shard.num_images for shard in stage.shards)
    num_pending = sum(shard.num_images for shard in stage.pending())
    if num_pending:
        num_workers = start_ray()
        with progress.stage("latents", total, total - num_pending) as bar:
            stage.encode(num_workers, bar.update)
    with progress.stage("index with latents"):
        return stage.finish()


def _wait_for_one(running: dict[ray.ObjectRef, int]) -> int:
    """Wait until a task has ended, take it out, raise what it raised; return its size."""
    (task,), _ = ray.wait(list(running), num_returns=1)
    try:
        ray.get(task)
    except RayTaskError as error:
        raise error.cause from error  # whose text is not a traceback
    return running.pop(task)
