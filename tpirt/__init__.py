"""tpirt: a peer-to-peer tensor-parallel runtime for large language models on small devices.

async with tpirt.Engine.connect("models/llama", local=4) as engine:
    async for token in engine.generate("Once upon a time"):
        print(token.text, end="")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tpirt.errors import TpirtError
from tpirt.types import Completion, Message, Progress, RankStats, SamplingParams, Token
from tpirt.version import __version__

if TYPE_CHECKING:
    from tpirt.engine import Conversation, Engine

__all__ = [
    "Completion",
    "Conversation",
    "Engine",
    "Message",
    "Progress",
    "RankStats",
    "SamplingParams",
    "Token",
    "TpirtError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # The engine brings torch, which takes a second to import: `tpirt --help` must not wait for it.
    if name in ("Conversation", "Engine"):
        return getattr(import_module("tpirt.engine"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
