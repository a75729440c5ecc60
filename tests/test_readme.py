"""Every command in README.md is one that the programs take, with options and settings they have."""

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

from cfld.openpose import HUB_FILENAME
from train.config import load_train_config

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
LAUNCHER = {"--hostfile", "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint",
            "--signal=TERM@120"}  # fmt: skip


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    blocks += re.findall(r"(?m)^    ((?:python|make) .*)$", README)
    for line in "\n".join(blocks).splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] not in ("source", "."):
            yield words


ALL = list(commands())
MODULES = [words for words in ALL if words[:2] == ["python", "-m"]]
TRAINING = [words for words in ALL if "train/main.py" in words]


def help_of(module, subcommand=()):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as stop:
        importlib.import_module(module).main([*subcommand, "--help"])
    assert stop.value.code == 0
    return shown.getvalue()


def test_there_is_nothing_else_to_type():
    targets = re.findall(r"(?m)^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"))
    others = [words for words in ALL if words not in MODULES and words not in TRAINING]
    assert len(MODULES) > 10
    assert len(TRAINING) > 4
    assert all(words[0] == "make" and words[1] in targets for words in others), others


@pytest.mark.parametrize("words", MODULES, ids=" ".join)
def test_options_exist(words):
    module, *arguments = words[2:]
    shown = help_of(module)
    if arguments and re.search(rf"[{{,]{re.escape(arguments[0])}[}},]", shown):
        shown = help_of(module, arguments[:1])
    options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    known = set(re.findall(r"--[a-z0-9_-]+", shown))
    assert options <= known


@pytest.mark.parametrize("words", TRAINING, ids=" ".join)
def test_settings_exist(words):
    arguments = words[words.index("train/main.py") + 1 :]
    settings = [word for word in arguments if re.match(r"[a-z_.]+=", word)]
    config = REPOSITORY / arguments[arguments.index("--config") + 1]
    assert load_train_config(config, settings).data
    options = {word for word in words if word.startswith("--")}
    known = set(re.findall(r"--[a-z0-9_-]+", help_of("train.main")))
    assert options - LAUNCHER <= known


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (REPOSITORY / link).exists()


def test_the_tree_is_the_tree():
    tree = README[README.index("## Where things are") :]
    folders = re.findall(r"(?m)^    ([a-z]+)/ ", tree)
    assert {"cfld", "demo", "preprocessing", "shards", "tests", "train"} <= set(folders)
    assert all((REPOSITORY / folder).is_dir() for folder in folders)


def test_messages_are_the_programs_own():
    rows = re.findall(r"(?m)^\| (`.*`) \|", README[README.index("## Troubleshooting") :])
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 8
    sources = [
        path.read_text(encoding="utf-8")
        for package in ("cfld", "preprocessing", "train")
        for path in (REPOSITORY / package).rglob("*.py")
    ]
    # Strings that go on in the next line, and values that are filled in.
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources)).replace("{HUB_FILENAME}", HUB_FILENAME)
    assert [text for text in quoted if text not in joined] == []
