"""What the training files of REPA and REPA-E hold beside the model: parts that sampling does not use, and old names.

These parts prove the family: no other family's training makes them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dit_export.checkpoints.file_kinds import check_regular
from dit_export.checkpoints.key_errors import short_name
from dit_export.checkpoints.statements import Statements
from dit_export.checkpoints.weights import StoredTensor, Weights, weights_from_file
from dit_runtime.core.errors import CheckpointError

logger = logging.getLogger("dit_runtime.export")  # a command prints what is logged below dit_runtime

_PROJECTOR = re.compile(r"projectors\.\d+\.[024]\.(weight|bias)")  # Linear, SiLU, Linear, SiLU, Linear
_LEGACY = re.compile(r"decoder_blocks\.(\d+)\.(.+)")  # REPA's first names of the blocks after the aligned ones
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_MEAN, _VARIANCE, _COUNT = "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"
_SECOND_EMBEDDER = re.compile(r"r_embedder\.mlp\.\d")
_LIGHTNING = re.compile(r"feat_rope\.freqs_cos|blocks\.0\.(mlp\.w12|norm1)\.weight")
_FAMILIES = ("repa", "lightningdit", "meanflow")  # of which a file may hold parts
_PAIRS = (("mean", "std"), ("latents_bias", "latents_scale"))  # in files of their own
_LIKE_DDT = re.compile(r"encoder_blocks\.|s_embedder\.|mask_token|decoder_pos_embed")


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation ``[C]`` of each channel of the autoencoder's own latents, for a model of normalized
    ones.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


@dataclass(frozen=True)
class ModelPart:
    """A file's tensors without what belongs to its training alone.

    Attributes:
        tensors: by official name.
        family: whose parameters or parts of a training are there: REPA's, LightningDiT's or MeanFlow's; None where they
            are those of several.
        sign: the name of a tensor that shows it.
        statistics: REPA-E's, of the latents.
        lacks_statistics: whether the model is of REPA-E's, and its statistics lie in a file of their own.
    """

    tensors: Mapping[str, StoredTensor]
    family: str | None = None
    sign: str = ""
    statistics: LatentStatistics | None = None
    lacks_statistics: bool = False


def take_model(said: Statements, tensors: Mapping[str, StoredTensor]) -> ModelPart:
    """The model in a file's ``tensors``, with its blocks' present names.

    The log names what is left out. ``said`` are the training arguments.

    Raises:
        CheckpointError: statistics that are none, or old and new names that do not fit each other.
    """
    projectors = [name for name in tensors if _PROJECTOR.fullmatch(name)]
    statistics = _statistics_of(said.source, tensors)
    own = {name: item for name, item in tensors.items() if name not in (*projectors, _MEAN, _VARIANCE, _COUNT)}
    legacy = [] if any(map(_LIKE_DDT.match, own)) else [name for name in own if _LEGACY.fullmatch(name)]
    if legacy:
        own = _rename_legacy(said, own)
    if projectors:
        count = sum(math.prod(tensors[name].shape) for name in projectors)
        logger.info(
            "%s: left out the projectors of REPA's training, which sampling does not use: %d tensors (%s, …), %.1f M "
            "parameters",
            said.source,
            len(projectors),
            short_name(projectors[0]),
            count / 1e6,
        )
    has_norm = _MEAN in tensors
    signs = {
        "a training of REPA": [*projectors, *legacy, *(name for name in (_MEAN,) if name in tensors)],
        "a LightningDiT": _signs_of_lightning(own),
        "a MeanFlow": [name for name in own if _SECOND_EMBEDDER.match(name)],
    }
    found = [(family, signs[whose][0], whose) for family, whose in zip(_FAMILIES, signs, strict=True) if signs[whose]]
    if len(found) > 1:
        (_, one, whose), (_, other, whose_else), *_ = found
        raise CheckpointError(
            f"{said.source}: holds parts of {whose} ({short_name(one)}) and of {whose_else} ({other}); such models are "
            "not supported, since neither's conventions need be theirs"
        )
    family, sign, _ = found[0] if found else (None, "", "")
    return ModelPart(own, family, sign, statistics, lacks_statistics=has_norm and statistics is None)


def _signs_of_lightning(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """The names that only a LightningDiT has: normalizations with a weight alone have no other family's bias."""
    if "blocks.0.norm1.bias" in tensors:
        return []
    return [name for name in tensors if _LIGHTNING.fullmatch(name)]


def statistics_from_file(file: Path) -> LatentStatistics:
    """The statistics in a file of a training's: ``mean`` and ``std`` of LightningDiT's, or REPA-E's scale and bias.

    REPA-E's ``latents_scale`` is one over the deviation, its ``latents_bias`` the mean.

    Raises:
        CheckpointError: the file cannot be read, or holds no such pair of one number a channel.
    """
    check_regular(file)
    weights = Weights(str(file), weights_from_file(file))
    pair = next((pair for pair in _PAIRS if all(name in weights for name in pair)), None)
    if pair is None:
        known = " or ".join(" and ".join(pair) for pair in _PAIRS)
        shown = ", ".join(map(short_name, list(weights)[:5])) or "nothing"
        raise CheckpointError(f"{file}: holds {shown}; expected statistics of latents, {known}")
    mean, spread = (weights[name] for name in pair)
    if mean.numel() != max((*mean.shape, 1)) or mean.numel() != spread.numel() or not bool((spread > 0).all()):
        raise CheckpointError(
            f"{file}: {pair[0]} {list(mean.shape)} and {pair[1]} {list(spread.shape)}: expected one number a channel "
            f"in both, and {pair[1]} above 0"
        )
    deviation = 1 / spread if pair[1] == "latents_scale" else spread
    return LatentStatistics(tuple(mean.flatten().tolist()), tuple(deviation.flatten().tolist()))


def _rename_legacy(said: Statements, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """``decoder_blocks.N`` as the block N after those that are named ``blocks``."""
    first = len({match[1] for name in tensors if (match := _BLOCK.match(name))})
    depth = said.number("encoder_depth")
    if not first or depth not in (None, first):
        raise CheckpointError(
            f"{said.source}: decoder_blocks follow {first} blocks, {'expected one or more' if depth is None else ''}"
            f"{'' if depth is None else f'and its training arguments say encoder_depth = {depth:g}'}; expected the "
            "first names of REPA, blocks.N up to its encoder_depth and decoder_blocks.N from there"
        )
    found = {}
    for name, item in tensors.items():
        match = _LEGACY.fullmatch(name)
        found[f"blocks.{first + int(match[1])}.{match[2]}" if match else name] = item
    return found


def _statistics_of(source: str, tensors: Mapping[str, StoredTensor]) -> LatentStatistics | None:
    if _MEAN not in tensors and _VARIANCE not in tensors:
        return None
    for name in (_MEAN, _VARIANCE):
        if name not in tensors or len(tensors[name].shape) != 1:
            what = list(tensors[name].shape) if name in tensors else "missing"
            raise CheckpointError(f"{source}: {name} is {what}; expected REPA-E's statistics, one number a channel")
    weights = Weights(source, tensors)
    mean, variance = weights[_MEAN], weights[_VARIANCE]
    if not bool(mean.any()) and bool((variance == 1).all()):
        return None  # of a batch norm that no training updated
    if mean.shape != variance.shape or not bool((variance > 0).all()):
        raise CheckpointError(
            f"{source}: {_MEAN} {list(mean.shape)} and {_VARIANCE} {list(variance.shape)}: expected as many variances "
            "as means, all above 0"
        )
    return LatentStatistics(tuple(mean.tolist()), tuple(variance.sqrt().tolist()))
