"""The backend ONNX Runtime: on a CPU, or on a GPU through its execution providers."""
