"""Finds the operations that a bundle's graphs compute in FP16, and names them in words.

Nodes are named after modules, ``blocks.17.attn.qkv/MatMul``: the name tells a node's unit of the precision policy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir as ir

from dit_runtime.bundle.manifest import SIZED_GRAPHS

_UNIT = re.compile(r"blocks\.\d+\.[a-z_]+|patch_embed|final(?![a-z_])")
_BLOCK = re.compile(r"blocks\.(\d+)(?:\.|$)(.*)")
# The operations of a unit in words, by the rest of their scope or by their type; several nodes may be one operation.
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
    """One arithmetic operation on FP16 numbers: the names of its node and result, its unit, and its name in words."""

    node: str
    tensor: str
    unit: str
    name: str


def scope_of(node: ir.Node) -> str:
    """The module that a node comes from, such as ``blocks.17.attn.qkv``; empty for the network itself."""
    scope, slash, _ = (node.name or "").rpartition("/")
    return scope if slash else ""


def unit_of(graph: str, node: ir.Node) -> str | None:
    """The unit of the precision policy that a node of a bundle's graph belongs to; None if it is always FP32."""
    if graph not in SIZED_GRAPHS:
        return graph  # conditioner, decoder and encoder are units themselves
    if match := _UNIT.match(scope_of(node)):
        return match[0]
    if node.op_type == "Cast" and node.outputs[0].dtype == ir.DataType.FLOAT16:  # at the border of a unit
        users = [unit_of(graph, user) for user, _ in node.outputs[0].uses()]
        return next((unit for unit in users if unit is not None), None)
    # Keys and values from the conditioner on their way to the blocks.
    return "conditioner" if node.outputs[0].dtype == ir.DataType.FLOAT16 else None


def find_fp16_operations(graph: str, model: ir.Model) -> list[Operation]:
    """The operations that a graph computes in FP16, in the graph's order, without those that only move numbers."""
    found = []
    for node in model.graph:
        unit = unit_of(graph, node)
        if unit is None or not is_fp16_operation(graph, node):
            continue
        result = node.outputs[0].name
        assert node.name is not None
        assert result is not None
        found.append(Operation(node.name, result, unit, describe_operation(unit, node)))
    return found


def describe_unit(unit: str) -> str:
    """A unit in words: ``block 17, attention``."""
    if (match := _BLOCK.match(unit)) and match[2]:
        return f"block {match[1]}, {_PARTS.get(match[2], match[2].replace('_', ' '))}"
    return {"patch_embed": "patch embedding", "final": "final layer"}.get(unit, unit)


def describe_operation(unit: str, node: ir.Node) -> str:
    """An operation in words: ``block 17, attention scores``, ``block 3, MLP first product``."""
    scope = scope_of(node)
    if not scope.startswith(unit):  # a border, or in the scopes of a graph that is one unit
        if node.op_type == "Cast" and _BLOCK.match(unit):
            return f"{describe_unit(unit)} input"
        where = f"block {match[1]}'s rows" if (match := _BLOCK.match(scope)) else _words_from_scope(scope)
        return f"{unit}, {where} {node.op_type}" if where else f"{unit}, {node.op_type}"
    rest = scope[len(unit) :].strip(".")
    if rest in _WORDS:
        return f"{describe_unit(unit)} {_WORDS[rest]}"
    if rest:
        return f"{unit}, {_words_from_scope(rest)} {node.op_type}"
    if unit.endswith("attn"):
        return f"{describe_unit(unit)} {_describe_attention_operation(node)}"
    return f"{describe_unit(unit)} {_WORDS[node.op_type]}" if node.op_type in _WORDS else describe_unit(unit)


def _words_from_scope(scope: str) -> str:
    return scope.replace(".", " ").replace("_", " ")


def _describe_attention_operation(node: ir.Node) -> str:
    """The part of an attention that a node belongs to: scores come before the softmax, the mix of values after it."""
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
    """Whether FP16 must hold the result of a node; a product to which only a bias is added need not be held."""
    result = node.outputs[0]
    if result.dtype != ir.DataType.FLOAT16 or node.op_type in _MOVES or unit_of(graph, node) is None:
        return False
    users = [user for user, _ in result.uses()]
    return not (
        node.op_type == "MatMul"
        and [user.op_type for user in users] == ["Add"]
        and any(value is not None and value.is_initializer() for value in users[0].inputs)
    )
