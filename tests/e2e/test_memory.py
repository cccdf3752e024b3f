"""Real processes under a tight --memory: what is measured, not what is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tpirt.config import ModelConfig
from tpirt.engine import Engine, EngineOptions
from tpirt.planning import PeerProfile, PlanOptions, format_limit, plan_model
from tpirt.testing.models import make_model
from tpirt.testing.processes import PeerProcess, run_cli
from tpirt.types import SamplingParams
from tpirt.units import parse_bytes

cpu_build = pytest.mark.skipif(
    torch.version.cuda is not None, reason="CUDA libraries take more than planning assumes"
)
# Weights larger than what a process may happen to take less than planning assumes.
SIZES = {"hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 4}


@cpu_build
def test_two_sessions_in_a_row_stay_within_a_tight_limit(tmp_path: Path) -> None:
    """What the allocator kept of the first session does not count against the second."""
    model = make_model(tmp_path / "model", max_position_embeddings=2048, **SIZES)
    limit = format_limit(tight_limit(model) + (8 << 20))
    with PeerProcess(tmp_path / "peer", "--memory", limit) as peer:
        for session in range(2):
            done = run_cli(
                *("generate", "--model", str(model), "--peers", peer.address),
                *("--memory", limit, "--threads", "1", "--store", str(tmp_path / "store")),
                *("--prompt", "x" * 900, "--max-tokens", "3", "--json"),
            )
            assert done.returncode == 0, (session, done.stderr)
            for rank in json.loads(done.stdout)["ranks"]:
                assert rank["bytes_read"] > 0, session  # during the answer: the limit bites
                if session == 0 and rank["rank"] == 0:
                    continue  # it cut the slices, which leaves some 20 MiB with the process
                assert rank["peak_rss_bytes"] <= parse_bytes(limit), (session, limit)


@pytest.mark.nightly
@cpu_build
def test_sixteen_prompts_at_once_stay_within_a_tight_limit(tmp_path: Path) -> None:
    """Of all lengths, so that steps have many numbers of rows; some wait for memory."""
    model = make_model(tmp_path / "model", max_position_embeddings=2048, **SIZES)
    limit = format_limit(tight_limit(model, world_size=1) + (8 << 20))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join("x" * (20 + 37 * number) for number in range(16)))
    for run in range(2):  # the first one cuts the slices, which leaves some 20 MiB
        done = run_cli(
            *("generate", "--model", str(model), "--memory", limit, "--threads", "1"),
            *("--store", str(tmp_path / "store"), "--prompts", str(prompts), "--max-tokens", "8"),
        )
        assert done.returncode == 0, (run, done.stderr)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 16
    peak = max(answer["ranks"][0]["peak_rss_bytes"] for answer in answers)
    assert peak <= parse_bytes(limit), (peak >> 20, limit)


@pytest.mark.nightly
async def test_a_peer_keeps_to_its_limit_over_sessions_that_differ(tmp_path: Path) -> None:
    """What the allocator kept of all earlier sessions together fits the slack."""
    long = {"max_position_embeddings": 1024, "num_key_value_heads": 8, "num_attention_heads": 8}
    big = make_model(
        tmp_path / "big", hidden_size=1024, intermediate_size=4096, num_hidden_layers=10, **long
    )
    wide = make_model(
        tmp_path / "wide", hidden_size=2048, intermediate_size=512, num_hidden_layers=2, **long
    )
    limit = 420 << 20
    kinds = [(big, "none"), (wide, "int8"), (big, "int8"), (wide, "none"), (big, "int4")]
    with PeerProcess(tmp_path / "peer", "--memory", "420M") as peer:
        for model, quantize in 2 * kinds:
            options = EngineOptions(quantize=quantize, threads=1, store=tmp_path / "store")
            async with Engine.connect(model, options, peers=[peer.address]) as engine:
                done = await engine.complete([7] * 900, SamplingParams(max_tokens=4))
            peak = done.ranks[1].peak_rss_bytes
            assert peak <= limit, (model.name, quantize, peak >> 20)


def tight_limit(model: Path, world_size: int = 2) -> int:
    """The least limit that is ever advised for so many ranks of the model."""
    peer = PeerProfile(0, "", "", None, None, 1, 1, False)
    options = PlanOptions(dtype="float32", chunk_tokens=16)
    deployment = plan_model(ModelConfig.from_dir(model), world_size, peer, options)
    return max(rank.budget.advised_bytes() for rank in deployment.ranks)
