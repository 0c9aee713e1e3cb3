"""The model as ONNX graphs: modules, tracing and precision."""
