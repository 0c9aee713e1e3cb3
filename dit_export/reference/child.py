"""The reference process itself: ``dit_export.reference.process`` starts this module, and reads its last line.

That is a JSON document: the measurements, or the error that stopped it, whatever its kind.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_runtime.core.errors import DiTError, explain
from dit_runtime.core.libraries import quiet_libraries
from dit_runtime.core.progress import show_progress
from dit_runtime.core.replace import hold_folder
from dit_runtime.core.streams import guarded_streams


def main() -> int:
    """Make the records that the arguments and stdin ask for."""
    show_progress()
    folder, encoder, precision, calibration = sys.argv[1:]
    with quiet_libraries(), guarded_streams():
        try:
            result = _make_records(folder, json.loads(encoder), precision, json.loads(calibration))
        except Exception as error:  # noqa: BLE001  # the parent says it, whatever it is
            kind = type(error) if isinstance(error, DiTError) else DiTError
            print(json.dumps({"error": kind.__name__, "message": explain(error)}))
            return 1
        print(json.dumps(result))
    return 0


def _make_records(folder: str, encoder: bool, precision: str, calibration: dict[str, Any]) -> dict[str, object]:
    from dit_export.checkpoints.libraries import import_libraries

    import_libraries()
    from dit_export.checkpoints.source import Source
    from dit_export.reference.process import make_records
    from dit_export.reference.record_settings import CalibrationRequest

    asked = CalibrationRequest(**{**calibration, "keep_fp16": tuple(calibration["keep_fp16"])})
    source = Source.from_json(sys.stdin.read())
    with hold_folder(Path(folder)):  # the parent may be killed, and another export begin
        return asdict(make_records(source, Path(folder), encoder, precision, asked))


if __name__ == "__main__":
    sys.exit(main())
