"""The comparison with other programs: reading what they print, taking turns, the table."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench.lib.rivals import (
    Dllama,
    LlamaBench,
    dllama_rates,
    llama_bench_rates,
    write_dllama_tokenizer,
)
from bench.peers import Case, cases, find_gguf, main, run_rounds, summarize
from tests.support.nightly import nightly
from tpirt.errors import ConfigError
from tpirt.testing.models import make_model

DLLAMA = """\
💡 SeqLen: 64
🧠 CPU: avx2 avx512f
💿 Loading weights...
💿 Weights loaded
aaaaaaaa
🔷️ Eval  112 ms Sync    3 ms | Sent     0 kB Recv     0 kB | (8 tokens)
🔶 Pred   36 ms Sync    0 ms | Sent     0 kB Recv     0 kB | [4522]
🔶 Pred   30 ms Sync    0 ms | Sent     0 kB Recv     0 kB | [4522]

Evaluation
   nBatches: 32
    nTokens: 8
   tokens/s: 69.57 (14.38 ms/tok)
Prediction
    nTokens: 2
   tokens/s: 30.30 (33.00 ms/tok)
"""

LLAMA_BENCH = [
    {
        "build_commit": "unknown",
        "cpu_info": "Intel(R) Xeon(R) Processor",
        "model_type": "llama 1B Q4_0",
        "n_threads": 2,
        "n_prompt": prompt,
        "n_gen": generated,
        "n_depth": 0,
        "avg_ns": 450308400,
        "stddev_ns": 0,
        "avg_ts": rate,
        "stddev_ts": 0.0,
        "samples_ns": [450308400],
        "samples_ts": [rate],
    }
    for prompt, generated, rate in ((128, 0, 284.25), (0, 64, 58.5))
]

FAKE_LLAMA_BENCH = """#!{python}
import sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert options["-p"] == "8" and options["-n"] == "2" and options["-t"] == "2", options
assert options["-m"].endswith("/model-Q4_0.gguf"), options
print({printed!r})
"""

FAILS = """#!{python}
import sys
print({printed!r}, file=sys.stderr)
sys.exit(3)
"""

FAKE_DLLAMA = """#!{python}
import pathlib, socket, sys
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if sys.argv[1] == "worker":
    server = socket.create_server((options["--host"], int(options["--port"])))
    server.accept()[0].recv(1)
else:
    assert options["--prompt"] == "a" * 8 and options["--steps"] == "10", options
    assert options["--nthreads"] == ("1" if "--workers" in options else "2"), options
    assert pathlib.Path(options["--tokenizer"]).stat().st_size > 264
    if "--workers" in options:
        host, _, port = options["--workers"].partition(":")
        socket.create_connection((host, int(port))).close()
    sys.stdout.buffer.write({printed!r}.encode())
"""


def llama_bench_output(prompt: int) -> str:
    return json.dumps(LLAMA_BENCH).replace("128", str(prompt))


def executable(path: Path, template: str, printed: str) -> Path:
    path.write_text(template.format(python=sys.executable, printed=printed))
    path.chmod(0o755)
    return path


def test_outputs_are_read() -> None:
    assert dllama_rates(DLLAMA, 8) == {"decode": 30.30, "prompt 8": 69.57}
    rates = llama_bench_rates(json.dumps(LLAMA_BENCH))
    assert rates == {"prompt 128": 284.25, "decode": 58.5}


def test_outputs_without_figures_are_refused() -> None:
    with pytest.raises(ConfigError, match="evaluated 8 tokens instead of 9"):
        dllama_rates(DLLAMA, 9)
    with pytest.raises(ConfigError, match="no summary, but at last: 🚨 Critical error: Cannot"):
        dllama_rates("💡 Arch: Llama\n🚨 Critical error: Cannot connect\n", 8)
    for text in ("", "no json", "[1]", '[{"n_prompt": 1}]'):
        with pytest.raises(ConfigError, match="llama-bench printed something else"):
            llama_bench_rates(text)


def test_tokenizer_has_as_many_tokens_as_the_model(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.t"
    write_dllama_tokenizer(file, 300)
    content = file.read_bytes()
    magic, size = struct.unpack_from("<ii", content)
    fields = struct.unpack_from(f"<{(size - 8) // 4}i", content, 8)
    header = dict(zip(fields[::2], fields[1::2], strict=True))
    assert (magic, header[1], header[3]) == (0x567124, 300, 298)
    tokens, place = [], size + 4 * header[9]
    while place < len(content):
        _, length = struct.unpack_from("<fI", content, place)
        tokens.append(content[place + 8 : place + 8 + length])
        place += 8 + length
    assert place == len(content)
    assert len(set(tokens)) == 300
    assert max(map(len, tokens)) == header[2]
    assert [token for token in tokens if set(token) == {ord("a")}] == [b"a"]


class Scripted:
    """A program whose figures are given."""

    def __init__(self, name: str, rates: Sequence[float], log: list[str]):
        self.name = name
        self._rates = iter(rates)
        self._log = log

    def run(
        self, bits: int, processes: int, threads: int, prompts: Sequence[int], tokens: int
    ) -> dict[str, float]:
        self._log.append(self.name)
        assert (bits, processes, threads, prompts, tokens) == (4, 1, 2, [128], 64)
        return {"decode": next(self._rates)}


def test_programs_take_turns_and_are_paired() -> None:
    log: list[str] = []
    tpirt = Scripted("tpirt", [30, 40, 35], log)
    other = Scripted("other", [20, 20, 10], log)
    case = Case(4, 1, 2, [tpirt, other])
    (result,) = run_rounds([case], 3, [128], 64)
    assert log == ["tpirt", "other", "other", "tpirt", "tpirt", "other"]
    (row,) = summarize(case, result)
    assert (row.figure, row.program, row.tpirt, row.other) == ("decode", "other", 35, 20)
    assert (row.lowest_ratio, row.ratio, row.highest_ratio) == (1.5, 2.0, 3.5)


def test_cases_follow_from_the_programs() -> None:
    tpirt, llama, dllama = (Scripted(name, [], []) for name in ("tpirt", "llama", "dllama"))

    def planned(llama: Scripted | None, dllama: Scripted | None) -> list[str]:
        return [
            f"{case}: {' '.join(program.name for program in case.programs)}"
            for case in cases(tpirt, llama, dllama, [4, 8], 2)
        ]

    both = ["4 bits, 1 x 2: tpirt llama dllama", "4 bits, 2 x 1: tpirt dllama"]
    assert planned(llama, dllama) == [*both, "8 bits, 1 x 2: tpirt llama"]
    assert planned(None, dllama) == ["4 bits, 1 x 2: tpirt dllama", "4 bits, 2 x 1: tpirt dllama"]
    assert planned(None, None) == []


def test_gguf_is_found_by_its_ending(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected one file \*q8_0\.gguf, found 0"):
        find_gguf(tmp_path, 8)
    (tmp_path / "model-Q8_0.gguf").touch()
    (tmp_path / "model-f16.gguf").touch()
    assert find_gguf(tmp_path, 8).name == "model-Q8_0.gguf"


FIGURES = [  # number of processes, figure, program, its figure
    (1, "decode", "llama.cpp", 58.5),
    (1, "decode", "distributed-llama", 30.3),
    (1, "prompt 8", "llama.cpp", 284.25),
    (1, "prompt 8", "distributed-llama", 69.57),
    (2, "decode", "distributed-llama", 30.3),
    (2, "prompt 8", "distributed-llama", 69.57),
]


def test_dllama_is_run_alone_and_with_a_worker(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.t"
    write_dllama_tokenizer(tokenizer, 300)
    program = executable(tmp_path / "dllama", FAKE_DLLAMA, DLLAMA)
    dllama = Dllama(program, tmp_path / "model.m", tokenizer)
    for processes, threads in ((1, 2), (2, 1)):
        rates = dllama.run(4, processes, threads, [8], 2)
        assert rates == {"decode": 30.3, "prompt 8": 69.57}


@pytest.mark.parametrize(
    "rivals", [["llama.cpp"], nightly(["llama.cpp", "distributed-llama"])], ids="-".join
)
def test_one_command_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rivals: list[str]
) -> None:
    model = make_model(tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "model-Q4_0.gguf").touch()
    llama = executable(tmp_path / "llama-bench", FAKE_LLAMA_BENCH, llama_bench_output(8))
    options = ["--model", str(model), "--store", str(tmp_path / "store"), "--rounds", "1"]
    options += ["--llama-bench", str(llama), "--gguf", str(tmp_path)]
    if "distributed-llama" in rivals:
        dllama = executable(tmp_path / "dllama", FAKE_DLLAMA, DLLAMA)
        options += ["--dllama", str(dllama), "--dllama-model", str(tmp_path / "model.m")]
    assert main([*options, "--bits", "4", "--prompts", "8", "--tokens", "2"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    rows = [
        (row["processes"], row["figure"], row["program"], row["other"]) for row in result["rows"]
    ]
    assert rows == [row for row in FIGURES if row[2] in rivals]
    assert all(row["ratio"] == row["tpirt"] / row["other"] for row in result["rows"])
    assert table[0].startswith(result["environment"]["cpu"])
    assert table[0].endswith(result["kernels"])
    assert "58.5 (58.5 to 58.5)" in table[3]
    assert str(tmp_path) not in last


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        ("missing", "missing: No such file"),
        ("fails", "fails: exit code 3: out of memory"),
    ],
)
def test_failures_are_told(tmp_path: Path, program: str, complaint: str) -> None:
    failing = executable(tmp_path / "fails", FAILS, "out of memory")
    rival = LlamaBench(failing.with_name(program), {4: tmp_path})
    with pytest.raises(ConfigError, match=complaint):
        rival.run(4, 1, 1, [8], 2)
