"""Text in, token ids out, and back: tokenizer, chat template, streaming decode, stop strings.

Only the master uses this room. It knows the files a Hugging Face model directory keeps about
text and nothing about weights, ranks or the network.
"""

from tpirt.text.detokenizer import Detokenizer, StopMatcher
from tpirt.text.template import ChatTemplate
from tpirt.text.tokenizer import Tokenizer, continue_chat

__all__ = ["ChatTemplate", "Detokenizer", "StopMatcher", "Tokenizer", "continue_chat"]
