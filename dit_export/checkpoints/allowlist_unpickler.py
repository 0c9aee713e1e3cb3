"""Reads a pickle without importing or calling anything that it names.

Every name in a pickle becomes something inert of ours: torch's functions that rebuild tensors become descriptions of
tensors, plain containers become lists and dicts, and an object of any other class becomes a ``Record`` of its fields.
Where reading would call anything else, that is an error with the name of what would be called.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, ClassVar, NoReturn

import torch

from dit_export.checkpoints.key_errors import short_name
from dit_export.checkpoints.stored import StoredTensor, unreadable_tensor

LARGEST_PICKLE = 1 << 24  # bytes; a training checkpoint of DiT-XL/2 with its optimizer has about 3e5
LONGEST_SHAPE = 32  # axes


class PickleError(Exception):
    """A pickle is damaged, or would need code to be read. The message is one line, without the file's name."""


class CodeError(PickleError):
    """Reading a pickle would call something that is not known to be harmless."""

    def __init__(self, name: str) -> None:
        super().__init__(f"reading it could execute code: {short_name(name)}")


class Record:
    """An object of a class that is not imported: its fields, and the class's name.

    Making one by a call is refused, since that is how a pickle runs code.
    """

    class_name = "object"
    fields: Any = None

    def __new__(cls, *_: object, **__: object) -> Record:
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        raise CodeError(self.class_name)

    def __setstate__(self, state: Any) -> None:
        self.fields = state


# Storage is what a persistent id of torch names: its key, its dtype (None: bytes), and how many elements it has.
Storage = tuple[str, Any, int]
TensorMaker = Callable[[Storage, int, tuple[int, ...], tuple[int, ...], Any], StoredTensor]


class AllowlistUnpickler(pickle._Unpickler):  # the implementation in C would allocate what a hostile opcode says
    """Unpickles plain values, torch's tensors as ``StoredTensor``, and other objects as ``Record``.

    Args:
        file: the pickle; at most ``LARGEST_PICKLE`` bytes are read.
        storage_from_id: what a persistent id means.
        make_tensor: describes a tensor in a storage: its storage, first element, shape, strides and dtype (None: the
            storage's own).
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: BinaryIO, storage_from_id: Callable[[Any], Any], make_tensor: TensorMaker) -> None:
        super().__init__(_Bounded(file), encoding="utf-8")
        self._storage_from_id, self._make_tensor = storage_from_id, make_tensor

    def read(self) -> Any:
        """The value. Raises PickleError for whatever is wrong."""
        try:
            return self.load()
        except PickleError:
            raise
        except Exception as error:  # any opcode may meet values it does not expect
            raise PickleError(f"it is damaged ({_in_short(error)})") from error

    def persistent_load(self, pid: Any) -> Any:
        return self._storage_from_id(pid)

    def find_class(self, module: str, name: str) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("it is damaged (a class without a name)")
        full = f"{module}.{name}"
        if full in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return lambda storage, offset, size, stride, *_: self._tensor(storage, offset, size, stride, None)
        if full == "torch._utils._rebuild_tensor_v3":
            return lambda storage, offset, size, stride, _, __, kind, *___: self._tensor(
                storage, offset, size, stride, kind
            )
        if full in CALLS:
            return CALLS[full]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module.split(".")[0] == "torch" and name.startswith("_rebuild"):
            what = name.removeprefix("_rebuild_").removesuffix("_no_storage").replace("_", " ")
            return lambda *_: unreadable_tensor(f"a {what} of torch" if "tensor" in what else f"a {what} tensor")
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return StorageType(name)
        return type(name, (Record,), {"class_name": full})

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, kind: Any) -> StoredTensor:
        plain = all(isinstance(part, tuple) and len(part) <= LONGEST_SHAPE for part in (storage, size, stride))
        if not plain or len(size) != len(stride) or not all(type(number) is int for number in (offset, *size, *stride)):
            raise PickleError("it is damaged (a tensor without a storage, shape or strides)")
        return self._make_tensor(storage, offset, size, stride, kind)

    # Opcodes that would allocate or hash what the file says, or set attributes of what it names.

    def _refuse(self) -> NoReturn:
        raise PickleError("it is damaged (an opcode that torch does not write)")

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(made := self.stack[-1], Record):
            made.fields = state
        elif not isinstance(made, dict | StoredTensor):  # of those the state is attributes, such as a dict's _metadata
            raise PickleError("it is damaged (a state of no object)")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        called = self.stack[-1]
        if isinstance(called, type) and issubclass(called, Record):
            raise CodeError(called.class_name)
        if not callable(called) or isinstance(called, StorageType) or not isinstance(arguments, tuple):
            raise PickleError("it is damaged (a call of no function)")
        self.stack[-1] = called(*arguments)

    def load_newobj(self) -> None:
        self.stack.pop()  # the arguments of __new__, which Record ignores
        self._make_record(self.stack.pop())

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_newobj()

    def _make_record(self, kind: Any) -> None:
        if kind in (_empty_dict, _record):
            self.stack.append(kind())
        elif isinstance(kind, type) and issubclass(kind, Record):
            self.stack.append(kind.__new__(kind))
        else:
            raise PickleError("it is damaged (an object of no class)")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _put(self.stack[-1], key, value)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for index in range(0, len(items) - 1, 2):
            _put(self.stack[-1], items[index], items[index + 1])

    def load_dict(self) -> None:
        items, made = self.pop_mark(), _empty_dict()
        for index in range(0, len(items) - 1, 2):
            _put(made, items[index], items[index + 1])
        self.stack.append(made)

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._list().extend(items)

    def load_append(self) -> None:
        value = self.stack.pop()
        self._list().append(value)

    def load_empty_set(self) -> None:
        self.stack.append([])

    def load_frozenset(self) -> None:
        self.stack.append(self.pop_mark())

    def _list(self) -> list[Any]:
        if not isinstance(made := self.stack[-1], list):
            raise PickleError("it is damaged (an item of no list)")
        return made


for _opcode in (
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ),
):
    AllowlistUnpickler.dispatch[_opcode[0]] = AllowlistUnpickler._refuse
for _opcode, _method in (
    (pickle.BUILD, AllowlistUnpickler.load_build),
    (pickle.REDUCE, AllowlistUnpickler.load_reduce),
    (pickle.NEWOBJ, AllowlistUnpickler.load_newobj),
    (pickle.NEWOBJ_EX, AllowlistUnpickler.load_newobj_ex),
    (pickle.SETITEM, AllowlistUnpickler.load_setitem),
    (pickle.SETITEMS, AllowlistUnpickler.load_setitems),
    (pickle.DICT, AllowlistUnpickler.load_dict),
    (pickle.APPEND, AllowlistUnpickler.load_append),
    (pickle.APPENDS, AllowlistUnpickler.load_appends),
    (pickle.EMPTY_SET, AllowlistUnpickler.load_empty_set),
    (pickle.ADDITEMS, AllowlistUnpickler.load_appends),
    (pickle.FROZENSET, AllowlistUnpickler.load_frozenset),
):
    AllowlistUnpickler.dispatch[_opcode[0]] = _method


class StorageType(str):
    """The name of a class of storage, such as ``FloatStorage``."""

    __slots__ = ()


class _Bounded:
    """A file of which only so many bytes can be read, and no more at once than there are."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, LARGEST_PICKLE

    def read(self, count: int) -> bytes:
        self._left -= count
        if count < 0 or self._left < 0:
            raise PickleError(f"its pickle is larger than {LARGEST_PICKLE >> 20} MiB; expected weights beside it")
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline(min(self._left, 1 << 16))
        self._left -= len(line)
        return line


def _put(made: Any, key: Any, value: Any) -> None:
    # Only short keys: the hash of nested tuples can take for ever.
    if not isinstance(made, dict) or not isinstance(key, str | int | float | bool | bytes | None):
        raise PickleError("it is damaged (a key that is no text and no number)")
    made[key] = value


def _empty_dict(items: Any = (), *_: Any) -> dict[Any, Any]:
    """What OrderedDict and its kin become: with protocol 2 they are filled later, older ones name pairs."""
    made: dict[Any, Any] = {}
    for pair in items if isinstance(items, list | tuple) else ():
        _put(made, *pair)
    return made


def _record(*_: Any) -> Record:
    """An object whose fields come later, as ``types.SimpleNamespace`` is written."""
    return Record.__new__(Record)


def _ignored(*_: Any) -> Record:
    """A value that says nothing about a model, such as a number of numpy or a path."""
    return Record.__new__(Record)


def _first(value: Any = (), *_: Any) -> Any:
    return value


DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

# What a pickle may call, and what is called instead.
CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _empty_dict,
    "collections.defaultdict": lambda *_: {},
    "collections.Counter": _empty_dict,
    "builtins.dict": _empty_dict,
    "builtins.set": _first,
    "builtins.frozenset": _first,
    "builtins.list": _first,
    "__builtin__.set": _first,
    "types.SimpleNamespace": _record,
    "copyreg._reconstructor": _record,
    "copy_reg._reconstructor": _record,
    "torch.Size": _first,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": lambda function, _, arguments, *__: (
        function(*arguments) if callable(function) and not isinstance(function, type) else _ignored()
    ),
    **dict.fromkeys(
        (
            *("torch.device", "torch.serialization._get_layout", "torch._C.Generator", "_codecs.encode"),
            *("numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
            *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
            *("numpy._core.numeric._frombuffer", "numpy.core.numeric._frombuffer"),
            *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.Path", "pathlib.PurePosixPath"),
            *("pathlib._local.PosixPath", "pathlib._local.WindowsPath", "pathlib._local.Path"),
            *("datetime.datetime", "datetime.date", "datetime.timedelta", "datetime.timezone", "uuid.UUID"),
            *("builtins.complex", "builtins.slice", "builtins.range", "builtins.bytearray", "builtins.object"),
        ),
        _ignored,
    ),
}


def _in_short(error: Exception) -> str:
    if isinstance(error, EOFError | IndexError | struct.error):
        return "it ends early"
    return short_name(" ".join(str(error).split())) or type(error).__name__
