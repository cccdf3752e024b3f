"""Memory of slicing and long contexts: the measured peak of a process, not an estimate.

Each measurement runs in a process of its own; its peak counts from the moment the work begins.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.nightly import nightly
from tpirt.testing.processes import run_python

PRELUDE = """
import warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
warnings.simplefilter("error")
from tpirt.cluster.machine import peak_resident_bytes, resident_bytes

def measured(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    base = resident_bytes()
    work()
    print(peak_resident_bytes() - base)
"""
MIB = 1 << 20

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"
)


def peaks_of(code: str) -> dict[str, int]:
    done = run_python("-c", PRELUDE + code, text=True, timeout_s=100)
    assert done.returncode == 0, done.stderr
    return {name: int(peak) for name, peak in map(str.split, done.stdout.splitlines())}


# -- slicing -----------------------------------------------------------------------------------

HIDDEN, INTERMEDIATE, VOCAB, LAYERS = 2048, 5632, 8192, 2


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 model of 450 MB that takes no room: a header and a hole."""
    from tpirt.config import ModelConfig
    from tpirt.weights.names import expected_tensors

    path = tmp_path_factory.mktemp("large")
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": VOCAB,
    }
    (path / "config.json").write_text(json.dumps(config))
    header: dict[str, object] = {}
    offset = 0
    for name, shape in expected_tensors(ModelConfig.from_hf(config)).items():
        nbytes = 4
        for size in shape:
            nbytes *= size
        span = [offset, offset + nbytes]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": span}
        offset += nbytes
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    assert offset > 300 * MIB
    return path


SLICING = """
import torch
from tpirt.cluster.provision import write_slice
from tpirt.cluster.slice_maker import SliceMaker
from tpirt.config import ModelConfig
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import make_partition
from tpirt.types import ignore_progress
from tpirt.weights.checkpoint import Checkpoint
from tpirt.weights.store import SliceStore

path = Path({path!r})
config = ModelConfig.from_dir(path)
plan = make_partition(config, {world}, {ratio!r})
with Checkpoint.open(path) as checkpoint:
    maker = SliceMaker(checkpoint, config, WeightFormat(torch.bfloat16))

    def work():
        if {store!r}:
            store = SliceStore(Path({store!r}))
            write_slice(maker, plan, 1, store, ignore_progress)
        else:
            for shard in plan.shards:
                blocks = maker.spec(shard).blocks
                for _, _, data in checkpoint.cut(config, shard, blocks):
                    len(data)

    print("slicing", end=" ")
    measured(work)
"""


@pytest.mark.parametrize("ratio", [None, nightly([1.0, 5.0, 1.0])], ids=["even", "uneven"])
def test_slicing_holds_a_few_pieces(large_model: Path, ratio: list[float] | None) -> None:
    code = SLICING.format(path=str(large_model), world=3, ratio=ratio, store="")
    # Far below even one tensor; the promise is the largest tensor and 64 MiB.
    assert peaks_of(code)["slicing"] < 48 * MIB < 4 * HIDDEN * VOCAB


def test_writing_a_slice_holds_a_few_pieces(large_model: Path, tmp_path: Path) -> None:
    code = SLICING.format(
        path=str(large_model), world=8, ratio=[9.0, *[1.0] * 7], store=str(tmp_path)
    )
    assert peaks_of(code)["slicing"] < 48 * MIB


# -- long contexts -----------------------------------------------------------------------------

ATTENTION = """
from tpirt.ops.nn import attention

def check(name, groups, tokens=128, length=100_000, dim=64, window=None, dtype="float32"):
    def run(tokens, length):
        keys = torch.randn(len(groups), length, dim, dtype=getattr(torch, dtype))
        queries = torch.randn(sum(groups), tokens, dim, dtype=getattr(torch, dtype))
        return lambda: attention(queries, keys, keys, groups, window)
    run(2, 4)()
    print(name, end=" ")
    measured(run(tokens, length))

check("grouped", [4] * 4)
check("multi-query", [8])
check("unequal", [2, 3])
check("bfloat16", [4] * 2, dtype="bfloat16")
check("window", [4] * 2, window=4096)
check("decode", [4] * 4, tokens=1)
# The square of these lengths is 1.6 GB in float32, and 400 MB as a mask of single bytes.
check("whole-prefill", [1], tokens=20_000, length=20_000, dim=8)
check("whole-prefill-window", [1], tokens=20_000, length=20_000, dim=8, window=100)
"""


def test_attention_is_linear_in_the_context() -> None:
    peaks = peaks_of(ATTENTION)
    assert len(peaks) == 8
    # All scores of one chunk of the first case at once would be 800 MB.
    assert {name: peak >> 20 for name, peak in peaks.items() if peak >= 80 * MIB} == {}


KEYS_AND_VALUES = """
from tpirt.batch import Segment
from tpirt.model.kv_store import KVLayout, KVStore

kv = KVStore(8, KVLayout(heads=4, dim=64, dtype=torch.float32))

def fill(slot, position, tokens):
    segment = Segment(slot, position, tokens, 1, position + tokens)
    kv.prepare([segment])
    rows = torch.ones(4, tokens, 64)
    for layer in range(8):
        kv.append(layer, segment, rows, rows)
    kv.commit([segment])

def report(name):
    print(name, resident_bytes() - base)

fill(0, 0, 512)  # torch's code is loaded
kv.free(0)
base = resident_bytes()
for position in range(0, 8192, 512):
    fill(0, position, 512)
    fill(1, position, 512)
report("two")
kv.free(1)
report("freed")
fill(0, 999, 1)
report("truncated")
fill(0, 0, 100)
report("restarted")
"""


def test_memory_of_keys_and_values_goes_back_to_the_system() -> None:
    """What a long conversation took is there for the next one, and for the weights."""
    held = peaks_of(KEYS_AND_VALUES)
    sequence = 8192 * 2 * 8 * 4 * 64 * 4
    assert 2 * sequence < held["two"] < 2.6 * sequence
    assert held["freed"] < 1.4 * sequence  # it grows by a quarter
    assert held["truncated"] < 0.3 * sequence
    assert held["restarted"] < held["truncated"] - 0.05 * sequence


ROWS = """
from tpirt.ops.nn import attention
from tpirt.ops.plain_kernels import PLAIN_KERNELS
from tpirt.ops.quant import Int4
from tpirt.ops.quant_kernels import KERNELS
from tpirt.ops.quant_probe import _probe_weight

half = torch.ones(512, 512, dtype=torch.bfloat16)
codes, _ = _probe_weight(Int4(), 512, 512, torch.bfloat16)

def multiply(rows):
    x = torch.ones(rows, 512)
    PLAIN_KERNELS["torch-bfloat16"](x, half)
    KERNELS["dense-bfloat16"](x, codes)

def attend(rows):
    x = torch.ones(8, rows + 100, 64, dtype=torch.bfloat16)
    attention(x[:, 100:], x, x, [1] * 8, None)

for name, work in (("products", multiply), ("attention", attend)):
    work(256)
    print(name, end=" ")
    measured(lambda: [work(rows) for rows in range(65, 185)])
"""


def test_all_numbers_of_rows_keep_little() -> None:
    """torch keeps compiled kernels for each one that it gets: 120 and 20 MiB for all of these."""
    peaks = peaks_of(ROWS)
    assert len(peaks) == 2
    assert {name: peak >> 20 for name, peak in peaks.items() if peak >= 12 * MIB} == {}
