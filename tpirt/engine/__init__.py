"""Generation on the master: text to ids, prefill, decode, sampling, conversations."""

from tpirt.engine.conversation import Conversation
from tpirt.engine.engine import Engine
from tpirt.engine.options import EngineOptions

__all__ = ["Conversation", "Engine", "EngineOptions"]
