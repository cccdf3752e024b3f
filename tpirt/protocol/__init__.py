"""What peers say to each other: messages, tensors' frames, links. Protobuf is imported here only."""
