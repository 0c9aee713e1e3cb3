"""The kernels that TensorRT-RTX compiled on a GPU, kept beside the plan so that the next process need not compile them.

A plan of TensorRT-RTX holds no kernels for one GPU: the library compiles them when an execution context is made, and a
runtime cache keeps what was compiled. Its file is for one GPU and driver. It is native code like the plan, and like the
plan it is trusted as far as the store's folder is. The library refuses a cache of another environment.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.backends.tensorrt.api import TensorRT
from dit_runtime.backends.tensorrt.cuda import DeviceFacts
from dit_runtime.core.errors import OutputError
from dit_runtime.core.reading import KERNELS_BYTES, FileError, read_file
from dit_runtime.core.replace import replace_file

logger = logging.getLogger(__name__)


class RuntimeCache:
    """The runtime cache of one engine, and its file.

    Args:
        library: TensorRT-RTX; for TensorRT the cache is empty and has no file.
        engine: the library's engine, deserialized.
        plan: the engine's plan file.
        facts: the GPU.

    Attributes:
        content: the library's object, for ``api.make_context``; None for TensorRT.
    """

    def __init__(self, library: TensorRT, engine: Any, plan: Path, facts: DeviceFacts) -> None:
        self.content = tensorrt_api.make_runtime_cache(library, engine)
        key = hashlib.sha256(f"{facts.name}\n{facts.driver}\n{library.version}".encode()).hexdigest()[:12]
        self._path = plan.with_name(f"{plan.stem}-{key}.kernels")
        self._kept = b""
        if self.content is not None and (found := self._read()):
            if tensorrt_api.fill_runtime_cache(self.content, found):
                self._kept = found
            else:
                logger.info("%s: of another environment; the kernels are compiled again", self._path)

    def keep(self) -> None:
        """Write the cache to its file where kernels were added. A store that cannot be written keeps none."""
        if self.content is None or (found := tensorrt_api.bytes_of_runtime_cache(self.content)) == self._kept:
            return
        try:
            with replace_file(self._path, self._path.parent) as temporary:
                temporary.write_bytes(found)
            self._kept = found
        except OutputError as error:
            logger.info("compiled kernels are not kept: %s", error)

    def _read(self) -> bytes:
        try:
            return read_file(self._path, KERNELS_BYTES, within=self._path.parent)
        except FileError:
            return b""
