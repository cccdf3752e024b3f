"""Everything needed to build the chat model that tpirt carries along as its demo."""
