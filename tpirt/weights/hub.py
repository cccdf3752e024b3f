"""Model directories by name: a folder, or a model in the local cache of the Hugging Face Hub.

Nothing is downloaded.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from tpirt.errors import CheckpointError
from tpirt.files import read_regular

FILES = "config.json, *.safetensors, tokenizer.json and the other *.json and *.jinja files"

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_HUB_PAGE = re.compile(rf"https?://(?:huggingface\.co|hf\.co)/({_HUB_NAME.pattern})", re.ASCII)


def find_model(model: str | Path) -> Path:
    """Return the directory of a model.

    Args:
        model: a directory, its ``config.json``, or ``ORG/NAME`` of a model in the Hub's cache, also
            as the address of its page. A path that exists is never taken for a name.

    Raises:
        CheckpointError: there is none, or it has another format; the message says how to get one.
    """
    if page := _HUB_PAGE.match(str(model)):
        return _cached(page[1])
    path = Path(model)
    if path.name == "config.json" and path.is_file():
        return path.parent
    if path.is_file():
        raise CheckpointError(f"{path}: expected a model directory, got a file; {_needed(path)}")
    if path.is_dir():
        _check_format(path)
        return path
    if not path.is_absolute() and not path.exists() and _HUB_NAME.fullmatch(str(model)):
        return _cached(str(model))
    return path  # reading its config.json says what is wrong


def model_name(path: Path) -> str:
    """The name of a model directory; of a snapshot in the Hub's cache, the model's name."""
    path = path.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.split("--", 2)[-1]
    return path.name


def _cached(name: str) -> Path:
    """The snapshot of ``main``, or else the latest one."""
    folder = _cache() / f"models--{name.replace('/', '--')}"
    try:
        commit = read_regular(folder / "refs" / "main").decode("ascii").strip()
        found = [folder / "snapshots" / commit]
    except (OSError, ValueError):
        found = sorted(folder.glob("snapshots/*"), key=lambda each: each.stat().st_mtime)
    if found and (found[-1] / "config.json").is_file():
        return found[-1]
    raise CheckpointError(
        f"{name}: no such folder, and not in the Hugging Face cache ({_cache()}); download it: "
        f"`hf download {name} --local-dir {name.partition('/')[2]}` (needed are {FILES}), then "
        "give that folder as --model"
    )


def _cache() -> Path:
    """As huggingface_hub has it."""
    environment = os.environ
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    home = environment.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(environment.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _check_format(path: Path) -> None:
    if (path / "config.json").exists():
        return
    for pattern in ("*.gguf", "*.pth"):
        other = next(path.glob(pattern), None)
        if other is not None:
            raise CheckpointError(f"{path}: no config.json, but {other.name}; {_needed(other)}")


def _needed(file: Path) -> str:
    """What to get instead of a file in another format."""
    needed = f"tpirt reads model directories with {FILES}"
    if file.suffix == ".gguf":
        return (
            f"GGUF is not supported: {needed}. Take the repository that the GGUF file was made "
            "from, and --quantize int4"
        )
    return f"{needed}: take the model's repository in that format"
