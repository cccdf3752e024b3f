"""What peers say to each other: messages, tensors' frames, links. It alone imports protobuf."""
