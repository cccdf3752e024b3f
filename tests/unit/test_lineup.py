"""Who takes part in the next group, and by which plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tpirt.config import ModelConfig
from tpirt.planning import PeerProfile, PlanOptions
from tpirt.planning.lineup import line_up, next_deployment
from tpirt.testing.models import make_model

ASKED = ["a", "b", "c"]
ALL = {1: "a", 2: "b", 3: "c"}


@pytest.mark.parametrize(
    ("current", "present", "chosen"),
    [
        ({}, ["a", "b", "c"], ALL),
        ({}, ["a", "b", "c", "s"], ALL),
        ({}, ["a", "c", "s"], {1: "a", 2: "s", 3: "c"}),
        (ALL, ["a", "b", "c", "s"], ALL),
        (ALL, ["a", "c", "s", "t"], {1: "a", 2: "s", 3: "c"}),
        (ALL, ["b", "s", "t"], {1: "s", 2: "b", 3: "t"}),
        (ALL, ["b"], {2: "b"}),
        (ALL, [], {}),
        # One that comes back takes no place from a spare; it takes the next one that is free.
        ({1: "a", 2: "s", 3: "c"}, ["a", "b", "c", "s"], {1: "a", 2: "s", 3: "c"}),
        ({1: "a", 2: "s", 3: "c"}, ["a", "b", "s"], {1: "a", 2: "b", 3: "s"}),
        ({1: "a", 2: "s", 3: "c"}, ["a", "s"], {1: "a", 2: "s"}),
        # After a plan for fewer, the group grows again.
        ({1: "a", 3: "c"}, ["a", "b", "c"], ALL),
        ({1: "a"}, ["s", "b"], {1: "s", 2: "b"}),
    ],
)
def test_line_up(current: dict[int, str], present: list[str], chosen: dict[int, str]) -> None:
    assert line_up(ASKED, current, present) == chosen


def profiles(*names: str) -> list[PeerProfile]:
    def profile(rank: int, name: str) -> PeerProfile:
        return PeerProfile(rank, name, name, None, None, threads=1, cores=1, bfloat16=True)

    return [profile(rank, name) for rank, name in enumerate(("master", *names))]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8}
    folder = tmp_path_factory.mktemp("lineup") / "model"
    return ModelConfig.from_dir(make_model(folder, "llama", **sizes))


def test_the_same_peers_keep_their_plan(config: ModelConfig) -> None:
    options = PlanOptions()
    first = next_deployment(config, options, ALL, profiles(*ASKED), None)
    again = [replace(peer, available_bytes=1 << 30) for peer in profiles(*ASKED)]
    assert next_deployment(config, options, ALL, again, first) is first
    smaller = [*again[:-1], replace(again[-1], memory_bytes=1 << 30)]
    assert next_deployment(config, options, ALL, smaller, first) is not first


def test_another_plan_keeps_the_numbers(config: ModelConfig) -> None:
    options = PlanOptions(quantize="auto")
    first = next_deployment(config, options, ALL, profiles(*ASKED), None)
    slow = [replace(peer, bfloat16=False, memory_bytes=700 << 20) for peer in profiles("a", "c")]
    other = next_deployment(config, options, {1: "a", 3: "c"}, slow, first)
    assert other.world_size == 3
    assert {rank.form for rank in other.ranks} == {rank.form for rank in first.ranks}


def test_the_ratio_follows_the_places(config: ModelConfig) -> None:
    options = PlanOptions(ratio=(1.0, 1.0, 2.0, 4.0))
    two = next_deployment(config, options, {2: "b", 3: "c"}, profiles("b", "c"), None)
    expected = PlanOptions(ratio=(1.0, 2.0, 4.0))
    three = {1: "b", 2: "c"}
    assert (
        two.partition
        == next_deployment(config, expected, three, profiles("b", "c"), None).partition
    )
