"""The kernels of an engine, read from the builder's log or from the engine's inspector.

TensorRT-RTX engines cannot be loaded on a machine without a GPU, so there is no inspector: the builder's verbose
``Layers:`` message lists every kernel with its datatypes and the ONNX nodes it came from, in the inspector's own terms.
TensorRT's inspector gives JSON. Its fields changed: 10.x writes ``"Format/Datatype": "Half"``, and ``N/A due to dynamic
shapes`` where it does not say; later releases ``"Datatype"`` beside ``"Format"``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LINE = re.compile(
    r"^Name: (?P<Name>.*?), LayerType: (?P<LayerType>\w+), Inputs: (?P<Inputs>.*?), Constants: (?P<Constants>.*?), "
    r"Outputs: (?P<Outputs>.*?)(?:, TacticName: (?P<TacticName>.*?), StreamId: .*?)?, Metadata:(?P<Metadata>.*)$"
)
_TENSOR = re.compile(r"Dimensions: \[(?P<Dimensions>[\d,\-]*)\][^}]*?Datatype: (?P<Datatype>\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_SUBGRAPH = re.compile(r"_myl(\d+)_\d+$")
_PROFILE = re.compile(r" \[profile (\d+)\]$")
# A datatype in the words of a format, or in the name of a tactic such as sm80_xmma_gemm_f16f16_f16f32_f32_tn_n.
_WORDS = {"Half": ("Half", "FP16", "f16f16", "h16816", "h1688", "h884"), "Float": ("Float", "FP32", "f32f32", "tf32")}
FUSED_ATTENTION = "_gemm_mha"
# Names of generated kernels are the operations in them: __myl_MoveTranSlic. These move data, and Cast changes its type.
_MOVES = ("Move", "Mov", "Tran", "Tra", "Resh", "Res", "Slic", "Sli", "Conc", "Repl", "Rep", "Expa", "Squ", "Unsq")
_CASTS = ("Cast", "Cas")


@dataclass(frozen=True)
class Kernel:
    """A kernel. ``dtype`` is what it multiplies in (``Half``, ``Float``, …), empty where that is not told.

    ``nodes`` are those of the ONNX that it does; ``weights`` the elements of its matrices and filters; ``subgraph`` the
    number that the compiler gave to the part of the network it is in, ``profile`` that of its optimization profile
    where its name says so.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    weights: int
    dtype: str
    subgraph: int | None
    profile: int | None

    @property
    def is_host(self) -> bool:
        """Shape arithmetic on the host: no kernel at all."""
        return self.kind in ("shape_call", "shape_host", "shapehosttodevice", "noop")

    @property
    def is_synchronization(self) -> bool:
        """A wait or signal between the streams of an engine."""
        return self.kind in ("wait", "signal")

    @property
    def is_fused_attention(self) -> bool:
        return self.name.startswith(FUSED_ATTENTION)

    @property
    def is_reformat(self) -> bool:
        """It moves data, or changes its type, and computes nothing."""
        return self.kind in ("reformat", "shuffle") or self._has_only(_MOVES + _CASTS)

    @property
    def is_cast(self) -> bool:
        """A reformat that changes the datatype."""
        return self.is_reformat and any(word in _CASTS for word in self._split_name())

    def _split_name(self) -> list[str]:
        name = self.name.partition("__myl_")[2].partition("_myl")[0]
        return re.findall(r"[A-Z][a-z]*", name)

    def _has_only(self, words: Sequence[str]) -> bool:
        found = self._split_name()
        return bool(found) and all(word in words for word in found)


def kernels_from_log(message: str) -> list[Kernel]:
    """Kernels of the builder's ``Layers:`` message, in its order."""
    found = []
    for line in message.splitlines():
        if (match := _LINE.match(line.strip())) is None:
            continue
        layer: dict[str, Any] = match.groupdict()
        for field in ("Inputs", "Constants", "Outputs"):
            layer[field] = [
                {"Dimensions": _numbers_from_text(tensor["Dimensions"]), "Datatype": tensor["Datatype"]}
                for tensor in _TENSOR.finditer(layer[field])
            ]
        found.append(kernel_from_layer(layer))
    return found


def kernel_from_layer(layer: Mapping[str, Any]) -> Kernel:
    """A kernel from a layer of the inspector's JSON. What is not in it is taken as not told."""
    name, metadata = str(layer.get("Name", "")), str(layer.get("Metadata") or "")
    constants = [_sizes_and_datatype_of(item) for item in _mappings_in(layer.get("Constants"))]
    matrices = [(sizes, dtype) for sizes, dtype in constants if sum(size > 1 for size in sizes) >= 2]
    weights, dtype = sum(math.prod(sizes) for sizes, _ in matrices), ""
    own = layer.get("Weights")
    if matrices:
        dtype = max(matrices, key=lambda item: math.prod(item[0]))[1]
    elif isinstance(own, Mapping):
        weights, dtype = int(own.get("Count", 0)), _datatype_from_text(str(own.get("Type", "")))
    if not dtype:
        inputs = {
            found for _, found in map(_sizes_and_datatype_of, _mappings_in(layer.get("Inputs"))) if found in _WORDS
        }
        dtype = (
            "Float"
            if "Float" in inputs
            else "Half"
            if inputs
            else _datatype_from_text(str(layer.get("TacticName") or ""))
        )
    subgraph, profile = _SUBGRAPH.search(name), _PROFILE.search(name)
    return Kernel(
        name=name,
        kind=str(layer.get("LayerType", "")).lower(),
        nodes=tuple(_NODE.findall(metadata)),
        weights=weights,
        dtype=dtype,
        subgraph=int(subgraph[1]) if subgraph else None,
        profile=int(profile[1]) if profile else None,
    )


def split_by_profile(kernels: Sequence[Kernel], count: int) -> list[list[Kernel]]:
    """Kernels of each of ``count`` optimization profiles, by their names.

    Compiled subgraphs are numbered through all profiles, each of which has as many of them.
    """
    numbers = sorted({kernel.subgraph for kernel in kernels if kernel.subgraph is not None})
    each = max(len(numbers) // count, 1)
    found: list[list[Kernel]] = [[] for _ in range(count)]
    for kernel in kernels:
        profile = kernel.profile or 0
        if kernel.profile is None and kernel.subgraph is not None:
            profile = numbers.index(kernel.subgraph) // each
        found[min(profile, count - 1)].append(kernel)
    return found


def _mappings_in(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _sizes_and_datatype_of(item: Mapping[str, Any]) -> tuple[list[int], str]:
    told = item.get("Datatype") or item.get("DataType") or item.get("Format/Datatype") or ""
    return [size for size in item.get("Dimensions") or [] if isinstance(size, int)], _datatype_from_text(str(told))


def _datatype_from_text(text: str) -> str:
    for dtype, words in _WORDS.items():
        if any(word in text for word in words):
            return dtype
    return "" if not text or text.startswith("N/A") else text.split()[0] if text[0].isupper() else ""


def _numbers_from_text(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
