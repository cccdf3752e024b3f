"""tpirt: a peer-to-peer tensor-parallel runtime for large language models on small devices.

async with tpirt.Engine.connect("models/llama", local=4) as engine:
    async for token in engine.generate("Once upon a time"):
        print(token.text, end="")
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tpirt.version import __version__

if TYPE_CHECKING:
    from tpirt.engine import Conversation, Engine, EngineOptions
    from tpirt.errors import TpirtError
    from tpirt.types import Completion, Message, Progress, RankStats, SamplingParams, Token

# torch's threads spin while they wait for each other. Beside anything else that runs (another rank,
# the disk's reader, another program) that made small operations up to 40 times slower; sleeping
# costs nothing measurable when alone. Read when torch is loaded, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# How many kernels oneDNN keeps, almost a MiB each; by default 1024. Those of a step are a dozen.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "24")
os.environ.setdefault("LRU_CACHE_CAPACITY", "24")

__all__ = [
    "Completion",
    "ConfigError",
    "Conversation",
    "Engine",
    "EngineOptions",
    "MemoryLimitError",
    "Message",
    "PeerLostError",
    "Progress",
    "QueueFullError",
    "RankStats",
    "RequestError",
    "SamplingParams",
    "Token",
    "TpirtError",
    "__version__",
]

_MODULES = {
    **dict.fromkeys(("Conversation", "Engine", "EngineOptions"), "tpirt.engine"),
    **dict.fromkeys((name for name in __all__ if name.endswith("Error")), "tpirt.errors"),
}


def __getattr__(name: str) -> Any:
    # The engine brings torch, which takes a second to import: `tpirt --help` must not wait for it.
    # Everything else is lazy because the command imports this before it can handle Ctrl-C.
    if name in __all__:
        return getattr(import_module(_MODULES.get(name, "tpirt.types")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
