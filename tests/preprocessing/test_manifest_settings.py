"""What the format's description says of a job's settings."""

import re
from pathlib import Path

import shards.format
from preprocessing.job_settings import JobSettings


def test_every_setting_in_the_manifest_is_described() -> None:
    readme = Path(shards.format.__file__).with_name("README.md").read_text(encoding="utf-8")
    table = readme.partition("## settings in manifest.json")[2].partition("`settings.latents`")[0]
    cells = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    described = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    record = JobSettings(dataset="folder", root="photos", output="out").record()
    assert described - {"latents"} == record.keys()
