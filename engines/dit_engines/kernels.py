"""Read an engine's kernels from the builder's log or from the engine's inspector.

A machine without a GPU cannot load an engine of TensorRT-RTX, so it cannot use the inspector. But the builder's verbose
message ``Layers:`` lists every kernel with its datatypes and its ONNX nodes, in the inspector's words. The inspector of
TensorRT returns JSON. Its fields have changed: 10.x writes ``"Format/Datatype": "Half"``, or ``N/A due to dynamic
shapes`` for an unknown datatype. Later releases write ``"Datatype"`` beside ``"Format"``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dit_runtime.bundle.precision import TENSORRT_DATATYPES, Precision

_LINE = re.compile(
    r"^Name: (?P<Name>.*?), LayerType: (?P<LayerType>\w+), Inputs: (?P<Inputs>.*?), Constants: (?P<Constants>.*?), "
    r"Outputs: (?P<Outputs>.*?)(?:, TacticName: (?P<TacticName>.*?), StreamId: .*?)?, Metadata:(?P<Metadata>.*)$"
)
_TENSOR = re.compile(r"Dimensions: \[(?P<Dimensions>[\d,\-]*)\][^}]*?Datatype: (?P<Datatype>\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_SUBGRAPH = re.compile(r"_myl(\d+)_\d+$")
_PROFILE = re.compile(r" \[profile (\d+)\]$")
# Words for each datatype: in a format, or in the name of a tactic such as sm80_xmma_gemm_f16f16_f16f32_f32_tn_n, whose
# first word is the factors' datatype and whose others are the sum's and the result's.
_WORDS = {
    Precision.FP32: ("FP32", "f32f32", "tf32", "sgemm", "s1688gemm_f32", "s1688gemm_tf32"),
    Precision.BF16: ("BF16", "bf16bf16", "gemm_bf16", "tensorop_bf16"),
    Precision.FP16: ("FP16", "f16f16", "h16816", "h1688", "h884", "hgemm", "gemm_f16", "tensorop_f16"),
    Precision.FP8: ("FP8", "e4m3e4m3", "gemm_e4m3", "tensorop_e4m3"),
    Precision.INT8: ("INT8", "i8i8", "gemm_s8", "i16832", "imma"),
}
FUSED_ATTENTION = "_gemm_mha"
# The name of a generated kernel lists its operations: __myl_MoveTranSlic. These move data, and Cast changes its type.
_MOVES = ("Move", "Mov", "Tran", "Tra", "Resh", "Res", "Slic", "Sli", "Conc", "Repl", "Rep", "Expa", "Squ", "Unsq")
_CASTS = ("Cast", "Cas")


@dataclass(frozen=True)
class Kernel:
    """A kernel of an engine.

    Attributes:
        name: the builder's name.
        kind: the inspector's layer type, in lower case.
        nodes: the ONNX nodes that the kernel computes.
        weights: the number of values in its matrices and filters.
        dtype: the datatype of its products (``Half``, ``Float``, …); empty where it is unknown.
        subgraph: number of the compiled part of the network that the kernel is in; None where its name has none.
        profile: index of its optimization profile; None where its name has none.
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
        """Whether this is arithmetic on shapes, which the host does, and no kernel."""
        return self.kind in ("shape_call", "shape_host", "shapehosttodevice", "noop")

    @property
    def is_synchronization(self) -> bool:
        """Whether this is a wait or a signal between the engine's streams."""
        return self.kind in ("wait", "signal")

    @property
    def is_product(self) -> bool:
        """Whether the kernel is a matrix product, with at most its epilogue fused."""
        return self.kind == "gemm"

    @property
    def is_fused_attention(self) -> bool:
        return self.name.startswith(FUSED_ATTENTION)

    @property
    def is_reformat(self) -> bool:
        """Whether the kernel only moves data or changes its datatype."""
        return self.kind in ("reformat", "shuffle") or self._has_only(_MOVES + _CASTS)

    @property
    def is_cast(self) -> bool:
        """Whether the kernel is a reformat that changes the datatype."""
        return self.is_reformat and any(word in _CASTS for word in self._split_name())

    def _split_name(self) -> list[str]:
        name = self.name.partition("__myl_")[2].partition("_myl")[0]
        return re.findall(r"[A-Z][a-z]*", name)

    def _has_only(self, words: Sequence[str]) -> bool:
        found = self._split_name()
        return bool(found) and all(word in words for word in found)


def kernels_from_log(message: str) -> list[Kernel]:
    """Kernels of the builder's message ``Layers:``, in its order. Other lines are skipped."""
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
    """A kernel from a layer of the inspector's JSON. A missing field counts as unknown.

    The datatype of the products is that of the weights; where the layer lists no weights, the one that the tactic's
    name tells; and where the name tells none, that of the factors among the inputs (``_datatype_of_factors``).
    """
    name, metadata = str(layer.get("Name", "")), str(layer.get("Metadata") or "")
    constants = [_sizes_and_datatype_of(item) for item in _mappings_in(layer.get("Constants"))]
    matrices = [(sizes, dtype) for sizes, dtype in constants if _is_matrix(sizes)]
    weights, dtype = sum(math.prod(sizes) for sizes, _ in matrices), ""
    own = layer.get("Weights")
    if matrices:
        dtype = max(matrices, key=lambda item: math.prod(item[0]))[1]
    elif isinstance(own, Mapping):
        weights, dtype = _count_from(own.get("Count")), _datatype_from_text(str(own.get("Type", "")))
    dtype = dtype or _datatype_from_tactic(str(layer.get("TacticName") or ""))
    dtype = dtype or _datatype_of_factors([_sizes_and_datatype_of(item) for item in _mappings_in(layer.get("Inputs"))])
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
    """Split kernels by their optimization profile.

    A listing has the kernels of every profile, told apart by ``[profile 1]`` in their names or by the numbers of their
    compiled subgraphs, which run through all profiles, as many for each. Or it has one set of kernels for all
    profiles, as TensorRT 10's inspector lists them ("layer information is not specified per profile", Polygraphy's
    ``polygraphy/backend/trt/util.py``): then every profile has this set.

    Args:
        kernels: of all profiles.
        count: the number of profiles.
    """
    numbers = sorted({kernel.subgraph for kernel in kernels if kernel.subgraph is not None})
    each = max(len(numbers) // count, 1)
    found: list[list[Kernel]] = [[] for _ in range(count)]
    for kernel in kernels:
        profile = kernel.profile or 0
        if kernel.profile is None and kernel.subgraph is not None:
            profile = numbers.index(kernel.subgraph) // each
        found[min(profile, count - 1)].append(kernel)
    if any(kernel.profile is not None for kernel in kernels) or _have_common_nodes(found):
        return found
    return [list(kernels) for _ in range(count)]


def _have_common_nodes(groups: Sequence[Sequence[Kernel]]) -> bool:
    """Whether all groups of kernels compute some same ONNX node, as those of several profiles do."""
    nodes = [{node for kernel in group for node in kernel.nodes} for group in groups]
    return bool(set.intersection(*nodes))


def _mappings_in(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _sizes_and_datatype_of(item: Mapping[str, Any]) -> tuple[list[int], str]:
    told = item.get("Datatype") or item.get("DataType") or item.get("Format/Datatype") or ""
    return [size for size in item.get("Dimensions") or [] if isinstance(size, int)], _datatype_from_text(str(told))


def _is_matrix(sizes: Sequence[int]) -> bool:
    """Whether a tensor has two axes longer than 1; a dynamic axis, -1, counts as longer. A scalar or bias has none."""
    return sum(size != 1 for size in sizes) >= 2


def _count_from(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _datatype_of_factors(inputs: Sequence[tuple[list[int], str]]) -> str:
    """The datatype in which a kernel multiplies, from its inputs' sizes and datatypes; empty where they do not tell.

    TensorRT lists the scalars alpha and beta, the bias and a residual beside the factors: a GEMM in FP16 has
    ``gemm_alpha [1] Float``, and where the FP32 residual stream is added in the same kernel, a matrix in Float too.
    Both factors of a product have one datatype, so where matrices have several, the datatype of two of them is meant.
    """
    told = [dtype for sizes, dtype in inputs if dtype and (_is_matrix(sizes) or not sizes)]
    if len(set(told)) == 1:
        return told[0]
    twice = [dtype for dtype in dict.fromkeys(told) if told.count(dtype) > 1]
    return twice[0] if len(twice) == 1 else ""


def _datatype_from_tactic(text: str) -> str:
    """TensorRT's name of the factors' datatype in a tactic's name, which comes first there; empty where it has none."""
    found = [
        (match.start(), TENSORRT_DATATYPES[precision])
        for precision, words in _WORDS.items()
        for word in words
        if (match := re.search(rf"(?<![a-z]){word}", text))
    ]
    return min(found)[1] if found else ""


def _datatype_from_text(text: str) -> str:
    """TensorRT's name of the datatype that a field tells; the field's first word where it is another one."""
    named = set(re.findall(r"\w+", text))
    for name in (TENSORRT_DATATYPES[precision] for precision in _WORDS):
        if name in named:
            return name
    if found := _datatype_from_tactic(text):
        return found
    return "" if not text or text.startswith("N/A") else text.split()[0] if text[0].isupper() else ""


def _numbers_from_text(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
