"""The threads of the native kernels: each piece of work is done once, without data races."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "tpirt/ops/native"


def compile_to(path: Path, *options: str) -> bool:
    sources = [NATIVE / "pool.c", ROOT / "tests/support/check_pool.c"]
    command = ["cc", "-O2", "-pthread", f"-I{NATIVE}", *options, *sources, "-o", path]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a compiler")
@pytest.mark.parametrize("sanitizer", ["none", "thread"])
def test_every_piece_is_done_once(tmp_path: Path, sanitizer: str) -> None:
    program = tmp_path / "check_pool"
    if not compile_to(program, *([] if sanitizer == "none" else [f"-fsanitize={sanitizer}"])):
        assert sanitizer != "none"
        pytest.skip(f"this compiler has no -fsanitize={sanitizer}")
    run = subprocess.run([program], capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("this kernel places memory where the sanitizer cannot follow")
    assert run.returncode == 0, run.stdout + run.stderr
