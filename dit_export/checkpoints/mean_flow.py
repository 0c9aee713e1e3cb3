"""What no shape tells of a MeanFlow: what its second time is, which way time runs, whether guidance is in its weights.

zhuyu-cs/MeanFlow's models embed t − r beside t, with time from noise at 1. Others embed r by the same names.
"""

from __future__ import annotations

from dit_export.checkpoints.source import Source
from dit_export.checkpoints.statements import ALONE, Statements, quote
from dit_runtime.bundle.manifest import END, INTERVAL, NOISE_AT_1
from dit_runtime.core.errors import CheckpointError

# What says that a file is of zhuyu-cs/MeanFlow, and arguments that only its training has.
AS_MEANFLOW = f"--family meanflow --path linear --second-time {INTERVAL}"
ARGUMENTS = ("ratio_r_not_equal_t", "cfg_omega", "cfg_kappa")
PROVEN = ("meanflow",)


def check_arguments(said: Statements) -> None:
    """Check that a model with a SiT's parameters does not get a second time by them.

    Raises:
        CheckpointError: its training arguments are kyungmnlee/dmf's, whose later blocks get r by the embedder of t.
    """
    if argument := said.sign_of(("dmf_depth",)):
        raise CheckpointError(
            f"{said.source}: its training arguments say {argument} = {quote(said.arguments[argument])}, which only a "
            "Decoupled MeanFlow, with the second time in its later blocks alone, has; not supported; the nearest "
            "family that is: meanflow"
        )


def check_parameters(source: Source, said: Statements, families: tuple[str, ...], words: str, sign: str) -> None:
    """Check that the conventions of a model with MeanFlow's parameters are MeanFlow's.

    Args:
        source: the options.
        said: the training arguments.
        families: that the arguments allow, or none where they say nothing; ``words`` are what says it.
        words: as for ``families``.
        sign: one of the parameters.

    Raises:
        CheckpointError: the arguments say another family, or nothing says which way time runs.
    """
    if len(families) == 1 and families != PROVEN:
        raise CheckpointError(
            f"{said.source}: has a MeanFlow's second timestep embedder ({sign}), and {words} say {families[0]}; not "
            "supported"
        )
    if source.family is None and source.time is None and families != PROVEN:
        raise CheckpointError(
            f"{said.source}: has a MeanFlow's second timestep embedder ({sign}), and no name or shape tells which way "
            f"time runs and what it embeds; say {AS_MEANFLOW} for a model of zhuyu-cs/MeanFlow, whose time is "
            f"{NOISE_AT_1}, or --second-time {END} for one that embeds r itself"
        )


def find_second_time(source: Source, said: Statements, families: tuple[str, ...], words: str) -> str:
    """What the model gets beside t, by ``--second-time`` or its own training arguments.

    Raises:
        CheckpointError: they contradict each other, or neither says it.
    """
    proven = INTERVAL if families == PROVEN else None
    if proven is not None and source.second_time not in (None, proven):
        raise CheckpointError(
            f"{said.source}: {words} say a model of zhuyu-cs/MeanFlow, which embeds {proven}, --second-time says "
            f"{source.second_time}; leave --second-time out, or {ALONE}"
        )
    if (found := source.second_time or proven) is None:
        raise CheckpointError(
            f"{said.source}: no name or shape tells what its second timestep embedder embeds, and the file does not "
            f"say it; say --second-time {INTERVAL} for a model of zhuyu-cs/MeanFlow, or --second-time {END} for one "
            "that embeds the end of the step itself"
        )
    return found


def is_unguided(said: Statements) -> bool:
    """Whether the training arguments say that no guidance was trained into the weights."""
    return said.number("cfg_omega") == 1 and said.number("cfg_kappa") == 0
