"""The exported network as PyTorch modules, its precision policy, and the ONNX graphs made of it."""
