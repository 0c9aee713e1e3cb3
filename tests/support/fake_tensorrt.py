"""A library that passes for TensorRT 10.3 on an L4, for the builder's path on a device.

TensorRT-RTX compiles in its place, ahead of time for the same compute capability. What needs a GPU is made up: an
engine has the inspector's JSON of TensorRT 10, in which one kernel does all multiply-adds of the graph in FP16 and
``DUMMY_ATTENTIONS`` are fused. So it shows that the path is whole, not what TensorRT would build.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import tensorrt_rtx
from tensorrt_rtx import *  # noqa: F403  # enums, profiles and logger are its own; so is ``bool``, a datatype

__version__ = "10.3.0"
_parsed: list[Path] = []


class Builder(tensorrt_rtx.Builder):
    """Builds for the GPU that is not here; ``DUMMY_WITHOUT_INT8`` is one that has no INT8."""

    platform_has_fast_int8 = "DUMMY_WITHOUT_INT8" not in os.environ

    def create_network(self, flags: int = 0) -> Any:
        """Explicit quantization is exact only where every type is the graph's own."""
        if not flags & 1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED):
            raise RuntimeError("a weakly typed network: TensorRT would choose the datatypes itself")
        return super().create_network(flags)

    def create_builder_config(self) -> Any:
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM89, 0)
        return config


class OnnxParser(tensorrt_rtx.OnnxParser):
    """Remembers what it parsed."""

    def parse_from_file(self, path: str) -> Any:
        _parsed.append(Path(path))
        return super().parse_from_file(path)


class Runtime:
    """Deserializes anything."""

    engine_host_code_allowed = True

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: Any) -> Engine:
        assert not self.engine_host_code_allowed
        return Engine(_parsed[-1])


class Engine:
    """The engine of a graph with one profile and no tensors."""

    num_io_tensors = 0
    num_optimization_profiles = 1

    def __init__(self, onnx_path: Path) -> None:
        self.onnx_path = onnx_path

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return 4096 + index

    def create_engine_inspector(self) -> Engine:
        return self

    def get_engine_information(self, layout: Any) -> str:
        import onnx

        nodes = onnx.load(self.onnx_path, load_external_data=False).graph.node
        metadata = "\x1f".join(f"[ONNX Layer: {node.name}]" for node in nodes)
        half = [{"Name": "x", "Dimensions": [-1, 64], "Format/Datatype": "Half"}]
        layers = [{"Name": "all", "LayerType": "gemm", "Inputs": half, "Metadata": metadata}]
        attentions = int(os.environ.get("DUMMY_ATTENTIONS", "0"))
        layers += [{"Name": f"_gemm_mha_v2_myl0_{n}", "LayerType": "kgen", "Inputs": half} for n in range(attentions)]
        return json.dumps({"Layers": layers, "Bindings": []})
