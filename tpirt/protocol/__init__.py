"""Messages, tensors and links between peers. The only package that imports protobuf."""
