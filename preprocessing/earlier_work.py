"""Looks at what the output holds already: a finished set, unfinished work, or others' files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from preprocessing.job_settings import JobSettings, SettingsError
from preprocessing.keypoint_stage import PARTS_FOLDER
from preprocessing.latent_actor import LATENTS_FOLDER
from preprocessing.latent_stage import LatentSettings
from preprocessing.listing_stage import list_selected
from preprocessing.shard_stage import RECORDS_FOLDER
from preprocessing.store import WORK_FOLDER, Store
from preprocessing.verify import REPAIR
from shards.format import LATENT_SETTINGS, MANIFEST_FILE, Manifest

SETTINGS_FILE = f"{WORK_FOLDER}/settings.json"
_WORK_FOLDERS = (PARTS_FOLDER, RECORDS_FOLDER, LATENTS_FOLDER)


@contextmanager
def tidied(store: Store) -> Iterator[None]:
    """Leave no temporary file, and no settings of a job that failed before it had made anything."""
    store.remove_temporary()
    try:
        yield
    except Exception:
        with suppress(Exception):  # what made the job fail is what counts
            names = [name for folder in _WORK_FOLDERS for name in store.names(folder)]
            if not any(name.endswith(".parquet") for name in names):
                store.remove_work()
        raise
    finally:
        store.remove_temporary()


def require_ours(store: Store) -> None:
    """Refuse a folder that no job of this command has left."""
    if store.exists(MANIFEST_FILE) or store.exists(SETTINGS_FILE):
        return
    work = [f"{WORK_FOLDER}/{name}" for name in store.names(WORK_FOLDER)]
    for name in [*store.names(), *work]:
        if name.endswith((".tar", ".parquet")) or (name in work and not name.endswith(".tmp")):
            raise SettingsError(
                f"{store.url('')}: holds {name}, but neither {MANIFEST_FILE} nor {SETTINGS_FILE}, "
                "so no unfinished job left it; choose another output folder. If this is a shard "
                "set that lost its manifest, copy that again, or remove the folder and build again"
            )


def find_finished(
    store: Store, settings: JobSettings, latents: LatentSettings | None
) -> Manifest | None:
    """Return the manifest if the set is complete, latents aside; refuse one of something else."""
    record = settings.record()
    if store.exists(MANIFEST_FILE):
        where = store.url(MANIFEST_FILE)
        manifest = Manifest.from_json(store.read_bytes(MANIFEST_FILE), where)
        if LATENT_SETTINGS in manifest.settings:
            record[LATENT_SETTINGS] = latents and asdict(latents)
        _require_same(record, manifest.settings, where)
        _require_whole(store, manifest)
        _require_same_photos(settings, manifest, where)
        return manifest
    if store.exists(SETTINGS_FILE):
        found = json.loads(store.read_bytes(SETTINGS_FILE))
        _require_same(record, found, store.url(SETTINGS_FILE))
    return None


def _require_same_photos(settings: JobSettings, manifest: Manifest, where: str) -> None:
    """List the root again: seconds, where a set that lacks new photos would go unnoticed.

    What files hold is not compared. A root that is gone is no longer needed.
    """
    try:
        listing = list_selected(settings)
    except FileNotFoundError:
        return
    if listing.sha256 != manifest.input_sha256:
        raise SettingsError(
            f"{settings.root}: other photos (names, persons, splits, sizes of files kept as they "
            f"are) lie here than when {where} was made; use another output folder"
        )


def _require_whole(store: Store, manifest: Manifest) -> None:
    """Compare names and sizes; what the files hold is for `inspect_shards --verify` to say."""
    sizes = store.sizes()
    damaged = [f.name for f in manifest.files if sizes.get(f.name) != f.size_bytes]
    if damaged:
        raise SettingsError(
            f"{store.url(MANIFEST_FILE)}: {len(damaged):,} of its files are missing or have "
            f"another size, the first is {damaged[0]}; {REPAIR}"
        )


def _require_same(wanted: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise SettingsError(
                f"{where}: made with {name} = {found.get(name)!r}, now it is "
                f"{wanted.get(name)!r}; use the settings of then, or another output folder"
            )
