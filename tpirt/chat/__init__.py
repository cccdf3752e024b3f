"""What a person sees and types: the chat, the plan of a load, progress on the console.

The master's terminal is this room's only outside world; everything it knows of the model it asks
of :class:`tpirt.engine.Engine`.
"""

from tpirt.chat.plan_view import show_plan
from tpirt.chat.progress import ConsoleProgress
from tpirt.chat.repl import ChatOptions, run_chat

__all__ = ["ChatOptions", "ConsoleProgress", "run_chat", "show_plan"]
