"""A user's sampler table on an engine: whether the engine's loop does what the table's numbers say."""

from __future__ import annotations

from dit_runtime.bundle.reader import Bundle
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.sampling.image_to_image import schedule_from_start
from dit_runtime.sampling.tables import check_table
from dit_runtime.verify.auto import open_to_verify
from dit_runtime.verify.loop_relations import replay_table
from dit_runtime.verify.replay import Replay
from dit_runtime.verify.rung import Rung


def rungs_of_table(bundle: Bundle, engine: str, precision: str | None, table: Schedule) -> tuple[str, list[Rung]]:
    """The engine's name, and the rungs of a sampler table: teacher-forced and free-running.

    Args:
        bundle: at the size in use.
        engine: a backend's name; ``auto`` is the engine that ``auto`` tries first, whatever its verdict.
        precision: the precision that OpenVINO computes in; None leaves the choice to the backend.
        table: from ``read_table``.

    Raises:
        SamplingError: the table is for another bundle or kind of model, or starts from an image.
        EngineError: no such backend is installed.
    """
    check_table(table, bundle.manifest, bundle.digest)
    schedule_from_start(table, False, None)
    opened = open_to_verify(engine, precision)(bundle)
    try:
        return opened.info.name, list(replay_table(Replay(bundle, opened), table))
    finally:
        opened.close()
