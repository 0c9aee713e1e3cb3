"""Checks where the tensors of an ONNX file lie: wholly in the file, or in the one file of weights beside it."""

from __future__ import annotations

import re
from dataclasses import replace

from dit_runtime.bundle.onnx_reader import Reader, StoredTensor
from dit_runtime.core.decode import DecodeError


def check_places(content: bytes, weights: str, weights_bytes: int) -> None:
    """Check where the tensors lie of a graph that ONNX Runtime wrote, before ONNX Runtime reads it again.

    Such a graph has operators, versions and forms of data of ONNX Runtime's own, which are not looked at.

    Args:
        content: of the ONNX file.
        weights: name of the one other file that tensors may lie in, in the same folder.
        weights_bytes: size of that file.

    Raises:
        DecodeError: the content is damaged, has a subgraph or a function, or a tensor does not lie wholly in this file
            or in ``weights``.
    """
    reader = Reader(content)
    for tensor in reader.read_written_tensors():
        if not tensor.external:
            continue
        packed = [entry for entry in tensor.external if re.fullmatch(r"prepacked_[0-9]{1,4}", entry[0], re.ASCII)]
        plain = tuple(entry for entry in tensor.external if entry not in packed)
        check_tensor(replace(tensor, external=plain), weights, weights_bytes)
        for _, text in packed:  # NAME|OFFSET;LENGTH;HASH|OFFSET;LENGTH;HASH…
            for part in text.split("|")[1:]:
                offset, length = (_natural(number) for number in [*part.split(";"), "", ""][:2])
                if offset is None or length is None or offset + length > weights_bytes:
                    raise DecodeError(f"tensor {tensor.name!r:.60} is packed at {part!r:.60} of {weights_bytes} bytes")


def check_tensor(tensor: StoredTensor, location: str | None, weights_bytes: int) -> None:
    """Raises DecodeError for a tensor that is not as large as its shape, or does not lie in its file."""
    what, size = f"tensor {tensor.name!r:.60}", tensor.size_bytes
    if not tensor.external:
        if tensor.inline_bytes != size:
            raise DecodeError(f"{what} has {tensor.inline_bytes} bytes, expected {size} for {list(tensor.shape)}")
        return
    entries = dict(tensor.external)
    if tensor.inline_bytes or len(entries) != len(tensor.external) or set(entries) != {"location", "offset", "length"}:
        keys = ", ".join(f"{key!r:.40}" for key, _ in tensor.external[:6])
        raise DecodeError(f"{what} lies outside by {keys}, expected 'location', 'offset' and 'length' once each")
    if entries["location"] != location:
        raise DecodeError(f"{what} lies in {entries['location']!r:.80}, expected {location!r:.80}")
    offset, length = (_natural(entries[key]) for key in ("offset", "length"))
    if offset is None or length is None:
        raise DecodeError(f"{what}: offset {entries['offset']!r:.40}, length {entries['length']!r:.40}: not numbers")
    if length != size or offset + length > weights_bytes:
        raise DecodeError(
            f"{what} of {size} bytes lies at {offset} to {offset + length} of {location!r:.80}, which has "
            f"{weights_bytes}"
        )


def _natural(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,19}", text, re.ASCII) else None
