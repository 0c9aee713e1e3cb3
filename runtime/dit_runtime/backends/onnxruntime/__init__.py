"""ONNX Runtime, on a CPU or through its providers for GPUs."""
