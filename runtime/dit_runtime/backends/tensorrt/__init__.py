"""TensorRT and TensorRT-RTX on a GPU, with the whole sampling loop on the device."""
