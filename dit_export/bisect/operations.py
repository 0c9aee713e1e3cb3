"""What the nodes of a bundle's graphs are: units of the precision policy, and operations that people have words for.

Nodes are named after modules, ``blocks.17.attn.qkv/MatMul``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir as ir

from dit_runtime.bundle.manifest import SIZED_GRAPHS

_UNIT = re.compile(r"blocks\.\d+\.[a-z_]+|patch_embed|final(?![a-z_])")
_BLOCK = re.compile(r"blocks\.(\d+)(?:\.|$)(.*)")
# A unit's operations by the rest of their scope and their type, in words; several nodes may make one operation.
_WORDS = {
    "qkv": "query, key and value product",
    "q": "query product",
    "proj": "output product",
    "fc1": "first product",
    "fc2": "second product",
    "Gelu": "GELU",
    "Softmax": "softmax",
}
_PARTS = {"attn": "attention", "cross_attn": "cross-attention", "mlp": "MLP"}
_MOVES = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Concat", "Split", "Expand", "Gather", "Identity")


@dataclass(frozen=True)
class Operation:
    """One arithmetic operation on FP16 numbers: its node's and result's names, its unit, and its name in words."""

    node: str
    tensor: str
    unit: str
    name: str


def scope_of(node: ir.Node) -> str:
    """The module that a node came from: ``blocks.17.attn.qkv``; empty for the network's own."""
    scope, slash, _ = (node.name or "").rpartition("/")
    return scope if slash else ""


def unit_of(graph: str, node: ir.Node) -> str | None:
    """The unit of the precision policy that a node of a bundle's graph belongs to; None for what is always FP32."""
    if graph not in SIZED_GRAPHS:
        return graph  # conditioner, decoder and encoder are units themselves
    if match := _UNIT.match(scope_of(node)):
        return match[0]
    if node.op_type == "Cast" and node.outputs[0].dtype == ir.DataType.FLOAT16:  # at the border of a unit
        users = [unit_of(graph, user) for user, _ in node.outputs[0].uses()]
        return next((unit for unit in users if unit is not None), None)
    # Keys and values from the conditioner on their way to the blocks.
    return "conditioner" if node.outputs[0].dtype == ir.DataType.FLOAT16 else None


def fp16_operations(graph: str, model: ir.Model) -> list[Operation]:
    """What a graph computes in FP16, in its order; what only moves numbers is left out."""
    found = []
    for node in model.graph:
        unit = unit_of(graph, node)
        if unit is None or not is_fp16_operation(graph, node):
            continue
        result = node.outputs[0].name
        assert node.name is not None
        assert result is not None
        found.append(Operation(node.name, result, unit, operation_name(unit, node)))
    return found


def unit_name(unit: str) -> str:
    """A unit as a person would call it: ``block 17, attention``."""
    if (match := _BLOCK.match(unit)) and match[2]:
        return f"block {match[1]}, {_PARTS.get(match[2], match[2].replace('_', ' '))}"
    return {"patch_embed": "patch embedding", "final": "final layer"}.get(unit, unit)


def operation_name(unit: str, node: ir.Node) -> str:
    """An operation as a person would call it: ``block 17, attention scores``, ``block 3, MLP first product``."""
    scope = scope_of(node)
    if not scope.startswith(unit):  # a border, or in the scopes of a graph that is one unit
        if node.op_type == "Cast" and _BLOCK.match(unit):
            return f"{unit_name(unit)} input"
        where = f"block {match[1]}'s rows" if (match := _BLOCK.match(scope)) else _in_words(scope)
        return f"{unit}, {where} {node.op_type}" if where else f"{unit}, {node.op_type}"
    rest = scope[len(unit) :].strip(".")
    if rest in _WORDS:
        return f"{unit_name(unit)} {_WORDS[rest]}"
    if rest:
        return f"{unit}, {_in_words(rest)} {node.op_type}"
    if unit.endswith("attn"):
        return f"{unit_name(unit)} {_attention_operation(node)}"
    return f"{unit_name(unit)} {_WORDS[node.op_type]}" if node.op_type in _WORDS else unit_name(unit)


def _in_words(scope: str) -> str:
    return scope.replace(".", " ").replace("_", " ")


def _attention_operation(node: ir.Node) -> str:
    """Around the softmax: what is before it makes scores, what is after it mixes values."""
    seen: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        at = waiting.pop()
        if at.op_type == "Softmax":
            return "softmax" if at is node else "scores"
        if at not in seen and scope_of(at) == scope_of(node):
            seen.add(at)
            waiting.extend(at.successors())
    return "softmax" if node.op_type == "Cast" else "mix of values"


def is_fp16_operation(graph: str, node: ir.Node) -> bool:
    """Whether a node computes a result that FP16 must hold; a product before its bias need not be held."""
    result = node.outputs[0]
    if result.dtype != ir.DataType.FLOAT16 or node.op_type in _MOVES or unit_of(graph, node) is None:
        return False
    users = [user for user, _ in result.uses()]
    return not (
        node.op_type == "MatMul"
        and [user.op_type for user in users] == ["Add"]
        and any(value is not None and value.is_initializer() for value in users[0].inputs)
    )
