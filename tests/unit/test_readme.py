"""The README: its snippets run as they stand, and its figures are those of the code."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tpirt.cli.main import build_parser
from tpirt.config import ModelConfig
from tpirt.planning import PeerProfile, PlanOptions, plan_model
from tpirt.testing.processes import run_python
from tpirt.weights.names import expected_tensors
from tpirt.weights.shapes import find_shape

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OTHERS = ("pip", "hf", ".")  # commands of others, which need a network or an installation


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


COMMANDS = [line for snippet in snippets("sh") for line in snippet.splitlines()]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line: str) -> None:
    """Each is complete in its line, of a command that exists and takes these options."""
    assert subprocess.run(["bash", "-n", "-c", line], check=False).returncode == 0
    command, *arguments = shlex.split(line, comments=True)
    if command == "tpirt":
        build_parser().parse_args(arguments)
    elif command == "python":
        assert arguments[0] == "-m"
        assert importlib.util.find_spec(arguments[1]) is not None
    elif command.startswith("scripts/"):
        assert os.access(ROOT / command, os.X_OK)
    else:
        assert command in OTHERS


def test_the_commands_are_found() -> None:
    assert {shlex.split(line)[0] for line in COMMANDS} >= {"scripts/launch_local.sh", "tpirt", "hf"}
    assert "--quantize int4" in next(line for line in COMMANDS if "--model" in line)


def test_the_python_snippet(tmp_path: Path) -> None:
    (code,) = snippets("python")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = run_python("-c", code, cwd=tmp_path, env=environment, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 20
    assert done.stderr == ""


def test_download_sizes_are_those_of_the_scripts() -> None:
    script = (ROOT / "scripts" / "_env.sh").read_text(encoding="utf-8")
    for size in ("250 MB", "2.8 GB"):
        assert f"size='{size}'" in script
        assert re.search(rf"{size}\s+to\s+download", README)


ROWS = dict(re.findall(r"^\| (\S+B) \| ((?:\S+ GB \| ){4})", README, re.MULTILINE))


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in ROWS if not name.endswith("70B")),
        pytest.param("Llama-3.1-70B", marks=pytest.mark.nightly),
    ],
)
def test_memory_of_models(name: str) -> None:
    config = ModelConfig.from_hf(find_shape(name.lower()))
    peer = PeerProfile(0, "one", "one", None, None, 1, 1, True)
    numbers = [sum(map(math.prod, expected_tensors(config).values())) * 2]
    for quantize in ("none", "int8", "int4"):
        deployment = plan_model(config, 1, peer, PlanOptions(quantize=quantize))
        numbers.append(deployment.ranks[0].budget.resident_bytes)
    assert ROWS[name].split(" | ")[:4] == [f"{number / 1e9:.1f} GB" for number in numbers]


def test_the_models_are_found() -> None:
    assert len(ROWS) == 5
