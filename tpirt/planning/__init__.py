"""Planning: from peers' profiles and options to a :class:`Deployment`.

Pure computation, without I/O.
"""

from tpirt.planning.advice import advise
from tpirt.planning.deployment import Deployment, RankPlan, plan, plan_model
from tpirt.planning.memory import (
    ADVISED_CONTEXT,
    Limits,
    MemoryBudget,
    format_limit,
    more_memory,
)
from tpirt.planning.options import KV_BITS, CollectiveOptions, PlanOptions
from tpirt.planning.profile import PeerProfile

__all__ = [
    "ADVISED_CONTEXT",
    "KV_BITS",
    "CollectiveOptions",
    "Deployment",
    "Limits",
    "MemoryBudget",
    "PeerProfile",
    "PlanOptions",
    "RankPlan",
    "advise",
    "format_limit",
    "more_memory",
    "plan",
    "plan_model",
]
