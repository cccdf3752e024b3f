"""The terminal interface: chat, the displayed plan, progress on the console.

All access to the model goes through :class:`tpirt.engine.Engine`.
"""

from tpirt.chat.plan_view import show_plan
from tpirt.chat.progress import ConsoleProgress
from tpirt.chat.repl import ChatOptions, run_chat

__all__ = ["ChatOptions", "ConsoleProgress", "run_chat", "show_plan"]
