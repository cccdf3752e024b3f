"""A text's loss, in bounded memory: the head is applied to a few tokens at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tpirt.config import ModelConfig
from tpirt.model.decoder import Decoder
from tpirt.planning.memory import activation_bytes
from tpirt.sharding.partition import make_partition
from tpirt.testing.cluster import memory_engine
from tpirt.testing.models import make_model

VOCAB, CHUNK = 5000, 32
IDS = [(37 * i + 11) % 256 for i in range(80)]


@pytest.mark.parametrize("world_size", [1, 2])
async def test_logits_take_no_more_than_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    model = make_model(tmp_path / "model", vocab_size=VOCAB)
    seen: list[int] = []
    logits = Decoder.logits

    async def counted(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return await logits(self, hidden)

    async with memory_engine(model, world_size, chunk_tokens=CHUNK) as engine:
        whole = await engine.logits(IDS)
        monkeypatch.setattr(Decoder, "logits", counted)
        loss = await engine.loss(IDS)
    assert loss == pytest.approx(
        float(F.cross_entropy(whole[:-1], torch.tensor(IDS[1:]), reduction="sum")), rel=1e-5
    )
    assert sum(seen) == len(IDS)
    config = ModelConfig.from_dir(model)
    shard = make_partition(config, world_size).shards[0]
    assert max(seen) * 8 * VOCAB <= activation_bytes(config, shard, world_size, CHUNK)
    assert 1 < max(seen) < CHUNK
