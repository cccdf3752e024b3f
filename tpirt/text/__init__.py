"""Text in, token ids out, and back: tokenizer, chat template, streaming decode, stop strings.

Used on the master only. Reads the text files of a Hugging Face model directory; independent of
weights, ranks and the network.
"""

from tpirt.text.detokenizer import Detokenizer, StopMatcher
from tpirt.text.template import ChatTemplate
from tpirt.text.tokenizer import Tokenizer, continue_chat

__all__ = ["ChatTemplate", "Detokenizer", "StopMatcher", "Tokenizer", "continue_chat"]
