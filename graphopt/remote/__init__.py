"""Running compiled models on other processors, over TVM's RPC: emulated ones, so far."""
