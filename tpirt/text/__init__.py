"""Text to token ids and back: tokenizer, chat template, streaming decode, stop strings.

Only the master uses this package. It reads the tokenizer files of a Hugging Face model directory,
and does not depend on weights, ranks or the network.
"""

from tpirt.text.detokenizer import Detokenizer, StopMatcher
from tpirt.text.template import ChatTemplate
from tpirt.text.tokenizer import Tokenizer, continue_chat

__all__ = ["ChatTemplate", "Detokenizer", "StopMatcher", "Tokenizer", "continue_chat"]
