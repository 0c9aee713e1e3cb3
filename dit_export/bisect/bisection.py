"""Finds the units that break an FP16 bundle's error budget: the shortest list to keep in FP32 that mends it.

Each trial moves some units of the bundle's own graphs to FP32 and runs the bundle's own verification up to the forward;
nothing is traced. The search has four stages.

1. All units are in FP32. If a rung fails now, precision is not the cause. This trial also measures every number that
   FP16 must hold.
2. Each unit alone is in FP16, in a graph of its block with FP32 activations. The errors order the units by the harm
   that they do.
3. Doubling and halving find the shortest beginning of this order that keeps the budget when it is in FP32.
4. Units that this list can do without are removed from it.

FP16 is emulated on ONNX Runtime's CPU provider: each operation computes in FP32, and its result is rounded to FP16. So
a result beyond FP16's range is seen; a sum that overflows inside a kernel that accumulates in FP16 is not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from dit_export.bisect.fp16_operations import describe_unit
from dit_export.bisect.graph_edits import Array
from dit_export.bisect.kernel_cost import KernelCost
from dit_export.bisect.precision_trials import CODERS, PrecisionTrials, Reason
from dit_export.graphs.precision import FP16_KEEPS_FP32
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import ParityError
from dit_runtime.core.progress import Progress
from dit_runtime.verify.rung import Rung

Item = TypeVar("Item")
CLOSEST = 3  # how many of the operations nearest to FP16's range are reported


@dataclass(frozen=True)
class Finding:
    """A unit to keep in FP32: its name in words, the reasons, and how many bytes its weights take more in FP32."""

    unit: str
    name: str
    reasons: tuple[Reason, ...]
    weights_bytes: int

    def __str__(self) -> str:
        return "; ".join(map(str, self.reasons))


@dataclass(frozen=True)
class Bisection:
    """What a bisection found.

    Attributes:
        engine: the name of the engine that it ran on.
        rungs: the rungs of the bundle as it is.
        fp32: the same rungs with all units in FP32.
        kept: the same rungs with the found units in FP32.
        findings: the units to keep in FP32 beyond those of the bundle's policy; empty if nothing breaks the budget.
        keep_fp32: the units of the bundle's policy and the found units, without the units that FP16 always keeps.
        closest: the operations nearest to FP16's range and their max |x|, of the units that stay FP16.
        weights_bytes: bytes of the bundle's weights files.
        trials: how often the network was verified.
        seconds: how long the search took.
        cost: the cost in kernels (``measure_kernel_cost``); None if it was not measured, or no builder is installed.
    """

    engine: str
    rungs: tuple[Rung, ...]
    fp32: tuple[Rung, ...]
    kept: tuple[Rung, ...]
    findings: tuple[Finding, ...]
    keep_fp32: tuple[str, ...]
    closest: tuple[tuple[str, float], ...]
    weights_bytes: int
    trials: int
    seconds: float
    cost: KernelCost | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        rungs = {"rungs": self.rungs, "fp32": self.fp32, "kept": self.kept}
        return {**asdict(self), **{name: [rung.as_json() for rung in items] for name, items in rungs.items()}}


def bisection_of(bundle: Bundle, weights: Mapping[str, Mapping[str, Array]] | None = None) -> Bisection:
    """Find the units that break an FP16 bundle's budget.

    Args:
        bundle: the bundle at the size in use.
        weights: the FP32 weights for units in FP32 (``weights_from_checkpoint``). None takes the bundle's own weights:
            the rounding to FP16 cannot be undone then.

    Raises:
        BundleError: a file of the bundle is missing or altered.
        EngineError: ONNX Runtime is missing or cannot run a graph.
        ParityError: the bundle does not keep the budget even with all units in FP32.
    """
    start = time.monotonic()
    trials = PrecisionTrials(bundle, weights or {})
    coders = [unit for unit in trials.units if unit in CODERS]
    network = [unit for unit in trials.units if unit not in CODERS]
    work = 2 + 2 * len(coders) + len(network) + 2 * math.ceil(math.log2(len(network) + 1))
    with Progress("bisecting", work) as bar:
        trials.advance = bar.advance
        fp32 = {
            "network": trials.verify_network(network),
            **{coder: (trials.verify_coder(coder, True),) for coder in coders},
        }
        _check_fp32(bundle, trials, _join(fp32), exact=weights is not None)
        rungs = {
            "network": trials.verify_network(()),
            **{coder: (trials.verify_coder(coder, False),) for coder in coders},
        }
        failing = [coder for coder in coders if not _all_pass(rungs[coder]) or trials.overflows([coder])]
        kept = {**rungs, **{coder: fp32[coder] for coder in failing}}
        found = set(failing)
        if not _all_pass(rungs["network"]) or trials.overflows(network):
            shortest = _search_network(trials, network, bar)
            found.update(shortest)
            kept["network"] = trials.verify_network([*failing, *shortest])
        units = [unit for unit in trials.units if unit in found]
        findings = tuple(
            Finding(unit, describe_unit(unit), trials.explain(unit), trials.count_added_bytes(unit)) for unit in units
        )
    manifest = bundle.manifest
    own = [unit for unit in manifest.precision.keep_fp32 if unit not in FP16_KEEPS_FP32]
    return Bisection(
        engine=trials.engine_name,
        rungs=_join(rungs),
        fp32=_join(fp32),
        kept=_join(kept),
        findings=findings,
        keep_fp32=(*own, *units),
        closest=_find_closest(trials, units),
        weights_bytes=sum(manifest.files[name].bytes for name in {graph.weights for graph in manifest.graphs.values()}),
        trials=trials.evaluations,
        seconds=round(time.monotonic() - start, 1),
    )


def _search_network(trials: PrecisionTrials, network: Sequence[str], bar: Progress) -> tuple[str, ...]:
    """The shortest list of the network's units that keeps the budget when it is in FP32."""
    harm = {}
    for unit in network:
        harm[unit] = trials.measure_error(unit)
        bar.advance()

    def passes(units: Sequence[str]) -> bool:
        rest = [unit for unit in network if unit not in units]
        return _all_pass(trials.verify_network(units)) and not trials.overflows(rest)

    return find_shortest(sorted(network, key=lambda unit: -harm[unit]), passes)


def _find_closest(trials: PrecisionTrials, found: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """The operations nearest to FP16's range, one of each unit that stays FP16."""
    nearest: dict[str, tuple[str, float]] = {}
    for operation, value in sorted(trials.largest.items(), key=lambda item: -item[1]):
        if operation.unit not in found:
            nearest.setdefault(operation.unit, (operation.name, value))
    return tuple(nearest.values())[:CLOSEST]


def find_shortest(order: Sequence[str], passes: Callable[[Sequence[str]], bool]) -> tuple[str, ...]:
    """The units of a beginning of ``order`` that pass together; without any one of them the others fail.

    It is known that all units together pass, and that no unit at all fails.
    """
    found = find_beginning(order, passes)
    for unit in found[:-1]:  # the search has shown that it fails without the last one
        fewer = tuple(other for other in found if other != unit)
        found = fewer if passes(fewer) else found
    return found


def find_beginning(order: Sequence[Item], passes: Callable[[Sequence[Item]], bool]) -> tuple[Item, ...]:
    """The shortest beginning of ``order`` that passes, where every longer one does; as above, all of it passes."""
    low, high = 0, 1
    while high < len(order) and not passes(order[:high]):
        low, high = high, 2 * high
    high = min(high, len(order))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(order[:middle]) else (middle, high)
    return tuple(order[:high])


def _join(rungs: Mapping[str, Iterable[Rung]]) -> tuple[Rung, ...]:
    return tuple(rung for each in rungs.values() for rung in each)


def _all_pass(rungs: Iterable[Rung]) -> bool:
    return all(rung.passed for rung in rungs)


def _check_fp32(bundle: Bundle, trials: PrecisionTrials, rungs: Sequence[Rung], exact: bool) -> None:
    """Raise a ParityError if a rung fails with all units in FP32; ``exact``: with the checkpoint's FP32 weights."""
    failed = next((rung for rung in rungs if not rung.passed), None)
    if failed is None:
        return
    problem = (
        f"{bundle.path}: {failed.name} fails with everything in FP32, {failed.text(failed.value)}, limit "
        f"{failed.text(failed.limit)} ({failed.detail})"
    )
    if exact:
        raise ParityError(f"{problem}: not a matter of precision; graphs or records are wrong, export the bundle again")
    lost = "; ".join(str(reason) for unit in trials.units for reason in trials.find_lost_weights(unit))
    raise ParityError(
        f"{problem}: a fault of the graphs, or what rounding the weights to FP16 lost{f' ({lost})' if lost else ''}; "
        f"name the checkpoint too, for its FP32 weights: dit-export CHECKPOINT --bisect {bundle.path}"
    )
