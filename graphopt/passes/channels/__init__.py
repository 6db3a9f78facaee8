"""Which channels of an ONNX graph depend on each other, and cutting some of them out of it."""
