"""The user interface: the chat, the table of a plan, progress on the console.

This package reads and writes the master's terminal; everything about the model comes from
:class:`tpirt.engine.Engine`.
"""

from tpirt.chat.plan_view import show_plan
from tpirt.chat.progress import ConsoleProgress
from tpirt.chat.repl import ChatOptions, run_chat

__all__ = ["ChatOptions", "ConsoleProgress", "run_chat", "show_plan"]
