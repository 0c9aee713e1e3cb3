"""The ONNX operators that a bundle's graphs may have, and how many inputs each takes, by ONNX's Operators.md.

The shape of each result follows from the inputs' shapes, as ``graph_shapes`` has it. Those are left out that hold
subgraphs, text, sequences or chance, and that make a tensor of any size from a number.
"""

from __future__ import annotations

from collections.abc import Sequence

MANY = 1 << 16

_INPUTS = {
    (0, 0): "Constant",
    (1, 1): (
        "Abs Acos Asin Atan Cast Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity IsInf IsNaN "
        "LeakyRelu Log LogSoftmax Mish Neg Not Reciprocal Relu Round Selu Shape Sigmoid Sign Sin Sinh Softmax Softplus "
        "Softsign Sqrt Tan Tanh ThresholdedRelu Transpose"
    ),
    (1, 2): "ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Split Squeeze",
    (1, 3): "Clip",
    (1, 4): "Resize",
    (1, MANY): "Concat Max Mean Min Sum",
    (2, 2): (
        "Add And CastLike Div Equal Expand Gather Greater GreaterOrEqual Less LessOrEqual MatMul Mod Mul Or PRelu Pow "
        "Reshape Sub Unsqueeze Xor"
    ),
    (2, 3): "Conv DequantizeLinear Gemm LayerNormalization QuantizeLinear",
    (2, 4): "Pad",
    (3, 3): "GroupNormalization InstanceNormalization Where",
    (3, 5): "Slice",
}
# By operator: the least number of inputs, each of which must be there, and the most.
INPUTS = {name: bounds for bounds, names in _INPUTS.items() for name in names.split()}

QUANTIZING = ("QuantizeLinear", "DequantizeLinear")

# A library divides whole numbers as the processor does, which ends the process at 0 and at the least number by -1.
DIVIDING = ("Div", "Mod", "ReduceMean")
_WHOLE = ("QuantizeLinear", "Shape")
_NOT_WHOLE = (
    *("And", "DequantizeLinear", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual"),
    *("Not", "Or", "Xor"),
)
WHOLE_TYPES = (2, 3, 4, 5, 6, 7, 12, 13)  # TensorProto.DataType


def makes_whole(operator: str, inputs: Sequence[bool], cast_to: int) -> bool:
    """Whether a node's results are whole numbers.

    Args:
        operator: its kind, one of ``INPUTS`` but Constant.
        inputs: whether each input is of whole numbers.
        cast_to: the data type that a Cast makes.
    """
    if operator == "Cast":
        return cast_to in WHOLE_TYPES
    if operator in _WHOLE or operator in _NOT_WHOLE:
        return operator in _WHOLE
    return inputs[1 if operator in ("CastLike", "Where") else 0]
