"""The shapes that a node makes of its inputs' shapes, by ONNX's Operators.md at opset 20.

A shape that a graph asks for (Reshape, Expand, Slice, Resize, Pad, …) is put together from constants and from the sizes
of other tensors, and from their sums, products and quotients, never from other numbers. So all shapes follow from the
sizes of the inputs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

from dit_runtime.bundle.node_call import Call, Made, MisfitError, Shape, Sized, checked_axis
from dit_runtime.bundle.operators import QUANTIZING

MOST_NUMBERS = 64  # that are followed of a tensor: a shape has 16 at most
MOST_SIZE = 1 << 40  # a product beyond it is not followed: it could leave 64 bits


def shapes_of_node(call: Call) -> Made:
    """The outputs of a node. Raises MisfitError where its inputs do not fit."""
    rule = _RULES.get(call.operator)
    if rule is not None:
        made = rule(call)
    elif call.operator in _SAME:
        made = Made((Sized(call.shape(0)),))
    else:
        made = Made((Sized(_broadcast([each.shape for each in call.inputs if each is not None])),))
    if len(made.outputs) != call.outputs:
        raise MisfitError(f"it has {call.outputs} outputs, expected {len(made.outputs)}")
    return made


def _axes(axes: Sequence[int], rank: int) -> tuple[int, ...]:
    found = tuple(checked_axis(axis, rank) for axis in axes)
    if len(set(found)) != len(found):
        raise MisfitError("an axis twice")
    return found


def _broadcast(shapes: Sequence[Shape]) -> Shape:
    rank = max(map(len, shapes))
    found = []
    for sizes in zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True):
        others = {size for size in sizes if size != 1}
        if len(others) > 1:
            raise MisfitError(f"axes of {_show(sizes)} do not fit each other")
        found.append(others.pop() if others else 1)
    return tuple(found)


def _combine(work: Callable[[int, int], int]) -> Callable[[Call], Made]:
    """Sizes may be added, multiplied and divided: with more images or pixels the result never becomes smaller.

    Only constants are less than 0. What could leave 64 bits in a library is not followed.
    """

    def rule(call: Call) -> Made:
        shape, numbers = _broadcast([call.shape(0), call.shape(1)]), None
        values = [
            each.numbers[0] for each in call.inputs if each is not None and each.numbers and len(each.numbers) == 1
        ]
        whole = [value for value in values if isinstance(value, int)]
        if len(whole) == len(call.inputs):
            found = work(*whole)
            numbers = (found,) if 0 <= found <= MOST_SIZE else None
        return Made((Sized(shape, numbers),))

    return rule


def _multiply(first: int, second: int) -> int:
    return first * second if min(first, second) >= 0 else -1


def _divide(size: int, divisor: int) -> int:
    return size // divisor if size >= 0 and divisor > 0 else -1  # by constants alone: graph_nodes


def _matmul(call: Call) -> Made:
    (*first, rows, inner), (*second, depth, columns) = (_of_rank(call.shape(place), 2) for place in (0, 1))
    if inner != depth:
        raise MisfitError(f"{inner} columns times {depth} rows")
    shape = (*_broadcast([tuple(first), tuple(second)]), rows, columns)
    return Made((Sized(shape),), math.prod(shape) * inner)


def _gemm(call: Call) -> Made:
    first, second = (
        _of_rank(call.shape(place), 2, 2)[:: -1 if call.numbers.get(name) else 1]
        for place, name in ((0, "transA"), (1, "transB"))
    )
    if first[1] != second[0]:
        raise MisfitError(f"{first[1]} columns times {second[0]} rows")
    return Made((Sized((first[0], second[1])),), first[0] * first[1] * second[1])


def _conv(call: Call) -> Made:
    batch, channels, *sides = _of_rank(call.shape(0), 3)
    filters, depth, *kernel = _of_rank(call.shape(1), 3, len(sides) + 2)
    ones, zeros = (1,) * len(sides), (0,) * 2 * len(sides)
    strides, dilations = (call.lists.get(name, ones) for name in ("strides", "dilations"))
    pads = call.lists.get("pads", zeros)
    if call.texts.get("auto_pad", "NOTSET") != "NOTSET" or call.lists.get("kernel_shape", tuple(kernel)) != (*kernel,):
        raise MisfitError("another padding or kernel than its own")
    if depth * call.numbers.get("group", 1) != channels:
        raise MisfitError(f"{channels} channels for a kernel of {depth}")
    if [len(strides), len(dilations), len(pads)] != [len(sides), len(sides), len(zeros)] or min(pads) < 0:
        raise MisfitError("strides, dilations or pads of another rank")
    if min(*strides, *dilations, *kernel) < 1:
        raise MisfitError("a stride, dilation or kernel of 0")
    padded = (side + before + after for side, before, after in zip(sides, pads, pads[len(sides) :], strict=False))
    found = tuple(
        (side - dilation * (width - 1) - 1) // stride + 1
        for side, dilation, width, stride in zip(padded, dilations, kernel, strides, strict=True)
    )
    shape = (batch, filters, *found)
    return Made((Sized(shape),), math.prod(shape) * depth * math.prod(kernel))


def _concat(call: Call) -> Made:
    axis, shapes = call.axis(0, 0), [call.shape(place) for place in range(len(call.inputs))]
    if len({(*shape[:axis], 0, *shape[axis + 1 :]) for shape in shapes}) > 1:
        raise MisfitError(f"shapes {_show(shapes)} side by side")
    shape = (*shapes[0][:axis], sum(each[axis] for each in shapes), *shapes[0][axis + 1 :])
    numbers = None
    if len(shape) == 1 and shape[0] <= MOST_NUMBERS:
        parts = [each.numbers for each in call.inputs if each is not None]
        numbers = None if None in parts else tuple(number for part in parts for number in part or ())
    return Made((Sized(shape, numbers),))


def _slice(call: Call) -> Made:
    shape, starts, ends = list(call.shape(0)), call.sizes(1), call.sizes(2)
    axes = call.known(3) or range(len(starts))
    steps = call.known(4) or (1,) * len(starts)
    numbers = call.inputs[0].numbers if call.inputs[0] is not None and len(shape) == 1 else None
    if not len(starts) == len(ends) == len(axes) == len(steps) or not all(steps):
        raise MisfitError("starts, ends, axes and steps of several lengths")
    for axis, start, end, step in zip(
        _axes([int(axis) for axis in axes], len(shape)), starts, ends, steps, strict=True
    ):
        part = slice(*slice(start, end, int(step)).indices(shape[axis]))
        numbers = None if numbers is None else numbers[part.start : part.stop if part.stop >= 0 else None : part.step]
        shape[axis] = len(range(part.start, part.stop, part.step))
    return Made((Sized(tuple(shape), numbers),))


def _gather(call: Call) -> Made:
    (shape, places), axis = (call.shape(0), call.shape(1)), call.axis(0, 0)
    data, indices = (each.numbers if each is not None else None for each in call.inputs)
    numbers = None
    if data is not None and indices is not None and len(shape) == 1 and len(places) <= 1:
        numbers = tuple(data[checked_axis(int(index), len(data))] for index in indices)
    return Made((Sized((*shape[:axis], *places, *shape[axis + 1 :]), numbers),))


def _split(call: Call) -> Made:
    shape, axis = call.shape(0), call.axis(0, 0)
    part = -(-shape[axis] // call.outputs)
    sizes = (part,) * (call.outputs - 1)
    wanted = call.sizes(1) if call.known(1) is not None else (*sizes, shape[axis] - sum(sizes))
    if sum(wanted) != shape[axis] or min(wanted) < 0:
        raise MisfitError(f"{shape[axis]} in parts of {_show(wanted)}")
    return Made(tuple(Sized((*shape[:axis], size, *shape[axis + 1 :])) for size in wanted))


def _reshape(call: Call) -> Made:
    shape, wanted = call.shape(0), list(call.sizes(1))
    for index, size in enumerate(wanted):
        if size == 0 and not call.numbers.get("allowzero"):
            wanted[index] = shape[checked_axis(index, len(shape))]
    if (unknown := wanted.count(-1)) > 1 or min(wanted, default=0) < -1:
        raise MisfitError(f"the shape {_show(wanted)}")
    if unknown:
        rest = math.prod(size for size in wanted if size != -1)
        wanted[wanted.index(-1)] = math.prod(shape) // rest if rest else 0
    if math.prod(wanted) != math.prod(shape):
        raise MisfitError(f"shape {_show(shape)} as {_show(wanted)}")
    return _same_numbers(call, tuple(wanted))


def _transpose(call: Call) -> Made:
    shape = call.shape(0)
    order = call.lists.get("perm", tuple(reversed(range(len(shape)))))
    if sorted(order) != list(range(len(shape))):
        raise MisfitError(f"the order {_show(order)} of {len(shape)} axes")
    return Made((Sized(tuple(shape[axis] for axis in order)),))


def _squeeze(call: Call) -> Made:
    shape, wanted = call.shape(0), call.known(1)
    if wanted is None and call.known(0) is not None:  # of sizes alone: of others, the number of images could be an axis
        wanted = tuple(axis for axis, size in enumerate(shape) if size == 1)
    axes = _axes(call.sizes(1) if wanted is None else [int(axis) for axis in wanted], len(shape))
    if any(shape[axis] != 1 for axis in axes):
        raise MisfitError(f"axes {_show(axes)} of {_show(shape)} removed")
    return _same_numbers(call, tuple(size for axis, size in enumerate(shape) if axis not in axes))


def _unsqueeze(call: Call) -> Made:
    left, wanted = list(call.shape(0)), call.sizes(1)
    rank = len(left) + len(wanted)
    axes = _axes(wanted, rank)
    return _same_numbers(call, tuple(1 if axis in axes else left.pop(0) for axis in range(rank)))


def _expand(call: Call) -> Made:
    wanted = call.sizes(1)
    if min(wanted, default=0) < 0:
        raise MisfitError(f"the shape {_show(wanted)}")
    return Made((Sized(_broadcast([call.shape(0), wanted])),))


def _resize(call: Call) -> Made:
    shape, scales = call.shape(0), call.known(2) or ()
    if "axes" in call.lists or call.texts.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise MisfitError("axes or an aspect ratio of its own")
    if scales and all(math.isfinite(scale) and scale > 0 for scale in scales) and len(scales) == len(shape):
        return Made((Sized(tuple(math.floor(size * scale) for size, scale in zip(shape, scales, strict=True))),))
    wanted = () if scales else call.sizes(3)
    if len(wanted) != len(shape) or min(wanted) < 1:
        raise MisfitError(f"shape {_show(shape)} by scales {_show(scales)} and sizes {_show(wanted)}")
    return Made((Sized(wanted),))


def _pad(call: Call) -> Made:
    shape, pads = list(call.shape(0)), call.sizes(1)
    axes = _axes(call.sizes(3) if call.known(3) is not None else range(len(shape)), len(shape))
    if len(pads) != 2 * len(axes):
        raise MisfitError(f"{len(pads)} pads for {len(axes)} axes")
    for axis, before, after in zip(axes, pads, pads[len(axes) :], strict=False):
        shape[axis] += before + after
    if min(shape, default=0) < 0:
        raise MisfitError(f"a shape of {_show(shape)}")
    return Made((Sized(tuple(shape)),))


def _quantize(call: Call) -> Made:
    """QuantizeLinear and DequantizeLinear: one scale, or a scale for each place along an axis; no blocks."""
    shape, scales = call.shape(0), call.shape(1)
    if scales and scales != (shape[call.axis(0, 1)],):
        raise MisfitError(f"scales of {_show(scales)} for {_show(shape)}")
    return Made((Sized(shape),))


def _reduce(call: Call) -> Made:
    shape, wanted = call.shape(0), call.lists.get("axes", ())
    if call.known(1) is not None:
        wanted = call.sizes(1)
    if not wanted and call.numbers.get("noop_with_empty_axes"):
        return Made((Sized(shape),))
    axes = _axes(wanted or range(len(shape)), len(shape))
    kept = call.numbers.get("keepdims", 1)
    return Made(
        (Sized(tuple(1 if axis in axes else size for axis, size in enumerate(shape) if kept or axis not in axes)),)
    )


def _shape(call: Call) -> Made:
    found = call.shape(0)[slice(call.numbers.get("start", 0), call.numbers.get("end"))]
    return Made((Sized((len(found),), found),))


def _same_numbers(call: Call, shape: Shape) -> Made:
    """The same numbers in another shape."""
    return Made((Sized(shape, call.inputs[0].numbers if call.inputs[0] is not None else None),))


def _of_rank(shape: Shape, least: int, most: int | None = None) -> Shape:
    if not least <= len(shape) <= (most or len(shape)):
        raise MisfitError(f"shape {_show(shape)}, expected {least} axes or another number")
    return shape


def _show(sizes: object) -> str:
    return f"{sizes!s:.80}"


_RULES: dict[str, Callable[[Call], Made]] = {
    **{"Add": _combine(operator.add), "Mul": _combine(_multiply), "Div": _combine(_divide), "MatMul": _matmul},
    **{"Gemm": _gemm, "Conv": _conv, "Concat": _concat, "Slice": _slice, "Gather": _gather, "Split": _split},
    **{"Reshape": _reshape, "Transpose": _transpose, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze},
    **{"Expand": _expand, "Resize": _resize, "Pad": _pad, "Shape": _shape},
    **dict.fromkeys(QUANTIZING, _quantize),
    **{f"Reduce{kind}": _reduce for kind in ("L1", "L2", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")},
}
# The result has the first input's shape; of all others it is the shape that the inputs are broadcast to.
_SAME = ("CastLike", "Clip", "GroupNormalization", "InstanceNormalization", "LayerNormalization")
