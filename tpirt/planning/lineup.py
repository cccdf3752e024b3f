"""Which peers form the next group, and by which plan: pure decisions, no input or output.

A start and a loss ask the same: who answers now? At a start there is no current group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tpirt.config import ModelConfig
from tpirt.planning.deployment import Deployment, plan
from tpirt.planning.options import PlanOptions
from tpirt.planning.profile import PeerProfile

Places = Mapping[int, str]  # worker peers by place; a place is a rank of the group as asked for


def line_up(asked: Sequence[str], current: Places, present: Sequence[str]) -> dict[int, str]:
    """Choose the workers of the next group; fewer than asked for if too few are present.

    Those of the current group stay. The other places go to other peers that are present, those
    asked for before spares. Each takes its own place if it is free, where its store has most units.

    Args:
        asked: the workers that the user asked for, by place, from 1.
        current: those of the current group.
        present: those that answer, asked for or spare, in order of preference.
    """
    staying = [peer for peer in present if peer in current.values()]
    others = [peer for peer in present if peer not in staying]
    others.sort(key=lambda peer: peer not in asked)  # stable
    chosen = (staying + others)[: len(asked)]
    own = {peer: place for place, peer in current.items()}
    own |= {peer: place for place, peer in enumerate(asked, start=1)}
    places: dict[int, str] = {}
    homeless = []
    for peer in sorted(chosen, key=lambda peer: peer not in asked):
        if peer in own and own[peer] not in places:
            places[own[peer]] = peer
        else:
            homeless.append(peer)
    free = (place for place in range(1, len(asked) + 1) if place not in places)
    places |= dict(zip(free, homeless, strict=False))
    return dict(sorted(places.items()))


def next_deployment(
    config: ModelConfig,
    options: PlanOptions,
    places: Places,
    peers: Sequence[PeerProfile],
    current: Deployment | None,
    *,
    trace_spans: int = 0,
) -> Deployment:
    """Plan the next group; the current plan if its peers are the same and have the same limits.

    Weights keep the format of the current plan, so that the same answers go on and units are
    reused.

    Args:
        config: the model.
        options: the user's; ``ratio`` is by place.
        places: the workers.
        peers: the processes, by rank: the master, and the workers in order of their places.
        current: the current plan; None at a start.
        trace_spans: see :func:`plan`.

    Raises: as :func:`plan`.
    """
    if current is not None and list(map(_limits, current.peers)) == list(map(_limits, peers)):
        return current
    if options.ratio is not None and len(places) < len(options.ratio) - 1:
        ratio = [options.ratio[place] for place in (0, *places)]
        options = replace(options, ratio=ratio)
    return plan(config, peers, options, like=current, trace_spans=trace_spans)


def _limits(peer: PeerProfile) -> tuple[str, int | None]:
    return peer.peer_id, peer.memory_bytes
