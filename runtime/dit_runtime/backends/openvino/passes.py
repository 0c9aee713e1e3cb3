"""Rearrange the step's graph for OpenVINO's CPU kernels: the same products and sums, in other pieces.

OpenVINO's matrix kernels are fastest when the matrices that a core multiplies fit in its cache. So the MLP's hidden
layer is cut into pieces as wide as the model, and the pieces' results are added. The product that computes queries,
keys and values becomes three products, so that the attention kernel reads each result without a copy. The casts around
the attention's softmax are removed. Products are cut only in models as wide as L and XL (``WIDE``): at the widths of S
and B cutting gains nothing on an EPYC (``benchmarks/cpu/README.md``) and costs 5 % on a Xeon with AMX.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dit_runtime.backends.base import Array

ARRANGEMENT = "2"  # version of this module: prepared graphs of another version are not used
WIDE = 1024  # least width of a model whose products are cut


def rearrange(model: Any, wide: int = WIDE) -> None:
    """Rearrange a model in place. Parts of the graph that do not look as expected are left as they are.

    Args:
        model: OpenVINO's model of a step or probe.
        wide: MLPs, and attention's first product, are cut in models of this width or wider. The casts around every
            softmax are removed in any model.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Gelu":
            _cut_mlp(node, wide)
        elif node.get_type_name() == "Transpose":
            _cut_attention(node, wide)
        elif node.get_type_name() == "Softmax":
            _join_softmax(node)
    model.validate_nodes_and_infer_types()


def _cut_mlp(gelu: Any, wide: int) -> None:
    from openvino import opset13

    first, second = _find_linear_before(gelu.input_value(0)), _find_linear_after(gelu)
    if first is None or second is None:
        return
    x, weight, bias, _ = first
    _, following, end_bias, end = second
    width, hidden = weight.shape
    if width < wide or hidden % width or hidden == width or following.shape[0] != hidden:
        return
    mode = gelu.get_attributes()["approximation_mode"].lower()
    total = None
    for start in range(0, hidden, width):
        part = slice(start, start + width)
        active = opset13.gelu(_make_linear(x, weight[:, part], bias[part]), mode)
        piece = _make_linear(active, following[part], end_bias if total is None else None)
        total = piece if total is None else opset13.add(total, piece)
    _replace(end, total)


def _cut_attention(transpose: Any, wide: int) -> None:
    """Cut the product of queries, keys and values in three.

    ``transpose`` changes the product's order from ``[N, T, 3, h, d]`` to ``[N, 3, h, T, d]``.
    """
    from openvino import opset13

    order, reshape = transpose.input_value(1).get_node(), transpose.input_value(0).get_node()
    if not (_is(order, "Constant") and list(order.get_data()) == [0, 2, 3, 1, 4] and _is(reshape, "Reshape")):
        return
    linear, shape = _find_linear_before(reshape.input_value(0)), reshape.input_value(1).get_node()
    cuts = [reader.get_node() for reader in transpose.output(0).get_target_inputs()]
    squeezed = {_start_of(cut): _find_only_reader(cut, "Squeeze") for cut in cuts}
    if linear is None or not _is(shape, "Constant") or set(squeezed) != {0, 1, 2} or None in squeezed.values():
        return
    x, weight, bias, _ = linear
    images, tokens, three, heads, size = (int(value) for value in shape.get_data())
    width = heads * size
    if width < wide or three != 3 or weight.shape[1] != 3 * width:
        return
    keys = _find_only_reader(squeezed[1], "Transpose")
    scores = None if keys is None else _find_only_reader(keys, "MatMul")
    if scores is None or list(keys.input_value(1).get_node().get_data()) != [0, 1, 3, 2]:
        return
    found = []
    for index in range(3):
        part = slice(index * width, (index + 1) * width)
        piece = opset13.reshape(_make_linear(x, weight[:, part], bias[part]), [images, tokens, heads, size], False)
        found.append(opset13.transpose(piece, [0, 2, 1, 3]))
    _replace(squeezed[0], found[0])
    _replace(squeezed[2], found[2])
    _replace(scores, opset13.matmul(scores.input_value(0), found[1], False, True))


def _join_softmax(softmax: Any) -> None:
    """Remove the casts of half-precision scores to FP32 and back.

    The attention kernel computes the softmax in FP32 in any case. Without the casts it fuses the softmax with the
    attention's products.
    """
    before, after = softmax.input_value(0).get_node(), _find_only_reader(softmax, "Convert")
    if _is(before, "Convert") and after is not None and _find_only_reader(before, "Softmax") is not None:
        softmax.input(0).replace_source_output(before.input_value(0))
        after.output(0).replace(softmax.output(0))


def _make_linear(x: Any, weight: Array, bias: Array | None) -> Any:
    from openvino import opset13

    product = opset13.matmul(x, _make_constant(weight, x.get_element_type()), False, False)
    return product if bias is None else opset13.add(product, _make_constant(bias, x.get_element_type()))


def _make_constant(values: Array, dtype: Any) -> Any:
    """A constant of an array that is part of another constant of this type.

    numpy has no BF16, so OpenVINO gives the bits of BF16 as those of FP16.
    """
    from openvino import Shape, Tensor, Type, op, opset13

    array = np.ascontiguousarray(values)
    if dtype != Type.bf16:
        return opset13.constant(array)
    return op.Constant(Tensor(array.view(np.uint16), Shape(list(array.shape)), dtype), shared_memory=False)


def _find_linear_before(value: Any) -> tuple[Any, Array, Array, Any] | None:
    """Find the linear layer that ends in ``value``: x, weight ``[in, out]``, bias ``[out]`` and its last node."""
    add = value.get_node()
    if not _is(add, "Add"):
        return None
    product, bias = (add.input_value(index).get_node() for index in (0, 1))
    if _is(product, "Constant"):
        product, bias = bias, product
    if not (_is(product, "MatMul") and _is(bias, "Constant")):
        return None
    weight, attributes = product.input_value(1).get_node(), product.get_attributes()
    if not _is(weight, "Constant") or attributes["transpose_a"] or len(weight.get_data().shape) != 2:
        return None
    values = weight.get_data()
    return product.input_value(0), values.T if attributes["transpose_b"] else values, bias.get_data(), add


def _find_linear_after(node: Any) -> tuple[Any, Array, Array, Any] | None:
    """As ``_find_linear_before``, for the only layer that reads ``node``."""
    product = _find_only_reader(node, "MatMul")
    add = None if product is None else _find_only_reader(product, "Add")
    return None if add is None else _find_linear_before(add.output(0))


def _find_only_reader(node: Any, kind: str) -> Any:
    """The only node that reads the first output of ``node``, if it is of that kind; else None."""
    readers = list(node.output(0).get_target_inputs())
    return readers[0].get_node() if len(readers) == 1 and _is(readers[0].get_node(), kind) else None


def _start_of(cut: Any) -> int | None:
    """The index at which a ``Slice`` begins; None for any other node."""
    begin = cut.input_value(1).get_node() if _is(cut, "Slice") else None
    return int(begin.get_data()[0]) if begin is not None and _is(begin, "Constant") else None


def _replace(node: Any, by: Any) -> None:
    by.set_friendly_name(node.get_friendly_name())
    node.output(0).replace(by.output(0))


def _is(node: Any, kind: str) -> bool:
    return bool(node.get_type_name() == kind)
