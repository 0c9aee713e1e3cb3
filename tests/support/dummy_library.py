"""A shared library without a compiler: named functions that all return 0, for x86-64 ELF.

TensorRT's Python bindings import nine functions from libraries that come with a GPU's software. A dummy lets the real
bindings be imported, and looked at, anywhere.
"""

from __future__ import annotations

import struct
from pathlib import Path

RETURN_ZERO = bytes.fromhex("31c0c3")  # xor eax, eax; ret
PAGE = 0x1000


def write_dummy_library(path: Path, soname: str, functions: list[str]) -> None:
    """Write an ELF64 shared object with ``functions`` (System V ABI, gABI chapters 4 and 5)."""
    strings = b"\0"
    offsets = {}
    for name in [*functions, soname]:
        offsets[name] = len(strings)
        strings += name.encode() + b"\0"
    header, program_headers = 64, 2 * 56
    code_at = header + program_headers
    symbols_at = _aligned(code_at + len(RETURN_ZERO))
    symbols = bytes(24) + b"".join(
        struct.pack("<IBBHQQ", offsets[name], 0x12, 0, 1, code_at, len(RETURN_ZERO))  # a global function
        for name in functions
    )
    strings_at = symbols_at + len(symbols)
    hash_at = _aligned(strings_at + len(strings))
    count = len(functions) + 1
    # One bucket: a chain through all symbols.
    table = struct.pack(f"<3I{count}I", 1, count, count - 1, 0, *range(count - 1))
    dynamic_at = _aligned(hash_at + len(table))
    entries = [
        (14, offsets[soname]),  # DT_SONAME
        (4, hash_at),  # DT_HASH
        (5, strings_at),  # DT_STRTAB
        (6, symbols_at),  # DT_SYMTAB
        (10, len(strings)),  # DT_STRSZ
        (11, 24),  # DT_SYMENT
        (0, 0),
    ]
    dynamic = b"".join(struct.pack("<2Q", *entry) for entry in entries)
    size = dynamic_at + len(dynamic)
    elf = struct.pack("<4s4B8x2HI3QI6H", b"\x7fELF", 2, 1, 1, 0, 3, 62, 1, 0, header, 0, 0, header, 56, 2, 64, 0, 0)
    load = struct.pack("<2I6Q", 1, 7, 0, 0, 0, size, size, PAGE)
    table_of_contents = struct.pack("<2I6Q", 2, 6, dynamic_at, dynamic_at, dynamic_at, len(dynamic), len(dynamic), 8)
    content = bytearray(size)
    for at, part in [
        (0, elf + load + table_of_contents),
        (code_at, RETURN_ZERO),
        (symbols_at, symbols),
        (strings_at, strings),
        (hash_at, table),
        (dynamic_at, dynamic),
    ]:
        content[at : at + len(part)] = part
    path.write_bytes(content)


def _aligned(offset: int) -> int:
    return (offset + 7) // 8 * 8
