"""A quantization scheme is one subclass and one table entry: nothing else knows the schemes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tpirt.cluster.synth import make_synthetic
from tpirt.config import ModelConfig
from tpirt.ops import quant
from tpirt.ops.buffers import Region, round_up
from tpirt.ops.quant import Scheme
from tpirt.ops.quant_linear import QuantMatrix
from tpirt.ops.quant_rounding import Workspace
from tpirt.ops.quant_units import MatrixUnits
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import make_partition
from tpirt.testing.cluster import memory_engine
from tpirt.testing.models import make_model
from tpirt.types import ignore_progress
from tpirt.weights.store import SliceStore

GROUP = 8
PROMPT = list(range(20, 40))


class GroupedUnits(MatrixUnits):
    """Codes are stored row by row: units are views."""

    @property
    def _rows(self) -> torch.Tensor:
        return self._packed

    def _unit_scales(self, rows: slice, columns: slice) -> torch.Tensor:
        return self._scales[rows, columns.start // GROUP : columns.stop // GROUP]

    def _get_codes(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(codes)

    def _put_codes(self, codes: torch.Tensor, content: torch.Tensor) -> None:
        codes.copy_(content)

    def _store(self) -> None:
        pass


@dataclass(frozen=True)
class Grouped(Scheme):
    """8 bits, a float32 scale per group of 8 inputs of a row."""

    kind = "grouped"

    def padded_in_features(self, in_features: int) -> int:
        return round_up(in_features, GROUP)

    @property
    def bits(self) -> float:
        return 8 + 32 / GROUP

    def regions(self, out_features: int, in_features: int) -> tuple[Region, Region]:
        return self.unit_regions(out_features, self.padded_in_features(in_features))

    def round_rows(
        self,
        w: torch.Tensor,
        start: int,
        codes: torch.Tensor,
        scales: torch.Tensor,
        space: Workspace,
    ) -> None:
        padded = torch.nn.functional.pad(w.float(), (0, codes.shape[1] - w.shape[1]))
        groups = padded.view(len(w), -1, GROUP)
        scale = groups.abs().amax(2).clamp(min=1e-20) / 127
        scales[start : start + len(w)] = scale
        codes.copy_((groups / scale.unsqueeze(2)).round().view(codes.shape))

    def part(self, matrix: QuantMatrix, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return matrix.codes[start:stop], matrix.scales[start:stop]

    def rows(self, matrix: QuantMatrix, start: int, stop: int, space: torch.Tensor) -> torch.Tensor:
        codes, scales = matrix.codes[start:stop], matrix.scales[start:stop]
        groups = codes.view(len(codes), -1, GROUP) * scales.unsqueeze(2)
        return groups.flatten(1).to(space.dtype)

    def column_step(self, start: int, step: int) -> int:
        return 0 if start % GROUP else round_up(step, GROUP)

    def unit_regions(self, rows: int, columns: int) -> tuple[Region, Region]:
        return (
            Region("codes", torch.int8, (rows, columns)),
            Region("scales", torch.float32, (rows, columns // GROUP)),
        )

    def units(self, codes: torch.Tensor, scales: torch.Tensor) -> MatrixUnits:
        return GroupedUnits(codes, scales)

    def even_scales(self, region: Region, rows: int, std: float) -> torch.Tensor:
        return torch.full(region.shape, std * 12**0.5 / 256)


@pytest.fixture(autouse=True)
def entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quant.SCHEMES, "grouped", Grouped())


async def logits(model: Path, store: Path, world_size: int, **options: Any) -> torch.Tensor:
    async with memory_engine(model, world_size, store=store, **options) as engine:
        return await engine.logits(PROMPT)


@pytest.mark.parametrize(("dtype", "lost"), [("float32", 0.02), ("bfloat16", 0.04)])
async def test_it_computes_what_plain_weights_do(tmp_path: Path, dtype: str, lost: float) -> None:
    """In bfloat16 the probe chooses among kernels, of which some read other schemes' codes only."""
    model = make_model(tmp_path / "model", "llama", intermediate_size=328)
    expected = await logits(model, tmp_path / "plain", 1)
    for world_size in (1, 2):
        options = {"quantize": "grouped", "dtype": dtype}
        got = await logits(model, tmp_path / "store", world_size, **options)
        assert (got - expected).norm() / expected.norm() < lost


def stored(store: Path) -> dict[str, list[bytes]]:
    """The bytes of all block files, by slice."""
    return {
        each.manifest.slice_id: [
            each.block_path(index).read_bytes() for index in range(len(each.manifest.blocks))
        ]
        for each in SliceStore(store).slices()
    }


async def test_another_plan_is_made_of_its_units(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", intermediate_size=328)
    used, fresh = tmp_path / "used", tmp_path / "fresh"
    await logits(model, used, 2, quantize="grouped")
    await logits(model, used, 2, quantize="grouped", ratio=(3.0, 1.0))
    await logits(model, fresh, 2, quantize="grouped", ratio=(3.0, 1.0))
    assert len(stored(fresh)) == 2
    assert stored(fresh).items() <= stored(used).items()


async def test_its_weights_can_be_drawn(tmp_path: Path) -> None:
    config = make_model(tmp_path / "model", "llama") / "config.json"
    shape = json.loads(config.read_text())
    out, form = tmp_path / "drawn", WeightFormat(torch.float32, Grouped())
    plan = make_partition(ModelConfig.from_hf(shape), 2)
    make_synthetic(out, shape, 0, plan, form, ignore_progress)
    got = await logits(out, out / "slices", 2, quantize="grouped")
    assert got.isfinite().all()
    assert got.std() > 0.01
