"""Which units of an FP16 bundle break its error budget, and the shortest list to keep in FP32 that mends it.

The bundle's own graphs are judged by the bundle's own verification, up to the forward, with units moved to FP32;
nothing is traced. First all of them: what fails then is not a matter of precision. On the way every number that FP16
has to hold is measured. Then each unit alone in FP16, in a graph of its block on FP32's activations: that orders the
units by the harm they do. The shortest beginning of that order that keeps the budget is found by doubling and halving,
and of it only units are left that are needed.

FP16 is emulated on ONNX Runtime's CPU provider: each operation computes in FP32 and its result is rounded to FP16. So
a result beyond FP16's range is seen; a sum that overflows inside a kernel that accumulates in FP16 is not.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dit_export.bisect.islands import Array
from dit_export.bisect.operations import unit_name
from dit_export.bisect.trials import CODERS, Reason, Trials
from dit_export.graphs.precision import FP16_KEEPS_FP32
from dit_runtime.bundle.manifest import FileSpec
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import ParityError
from dit_runtime.core.files import replace_file, sha256_of
from dit_runtime.core.progress import Progress
from dit_runtime.verify.budget import FP16_MAX
from dit_runtime.verify.rung import Rung

CLOSEST = 3  # operations nearest to FP16's range that are told
TRIALS = "FP16 is emulated: results are rounded to FP16, sums inside a kernel are FP32; overflow inside one is not seen"


@dataclass(frozen=True)
class Finding:
    """A unit to keep in FP32, its name in words, why, and how many bytes its weights grow by."""

    unit: str
    name: str
    reasons: tuple[Reason, ...]
    weights_bytes: int

    def __str__(self) -> str:
        return "; ".join(map(str, self.reasons))


@dataclass(frozen=True)
class Cost:
    """A step of one image with guidance as the TensorRT-RTX builder makes it, without and with the found units."""

    builder: str
    kernels: tuple[int, int]
    fused_attention: tuple[int, int]
    weights_bytes: tuple[int, int]


@dataclass(frozen=True)
class Bisection:
    """What a bisection found.

    Attributes:
        engine: that it ran on.
        rungs: of the bundle as it is; ``fp32`` with all units in FP32, ``kept`` with the found ones.
        findings: units to keep in FP32 beyond those of the bundle's policy; none when nothing breaks the budget.
        keep_fp32: units of the bundle's policy and the found ones, without those that FP16 always keeps.
        closest: of the units that stay FP16, the operations nearest to its range, and their max |x|.
        weights_bytes: of the bundle's graphs.
        trials: evaluations of the network.
        seconds: that the search took.
        cost: in kernels (``kernel_cost``); None where it was not asked for, or no builder is installed.
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
    cost: Cost | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        rungs = {name: [rung.as_json() for rung in getattr(self, name)] for name in ("rungs", "fp32", "kept")}
        return {**asdict(self), **rungs}


def bisection_of(bundle: Bundle, weights: Mapping[str, Mapping[str, Array]] | None = None) -> Bisection:
    """Find the units that break an FP16 bundle's budget.

    Args:
        bundle: at the size in use.
        weights: FP32 weights for the units in FP32 (``fp32_weights``); None takes the bundle's, which are rounded to
            FP16: what rounding lost cannot be had back.

    Raises:
        BundleError: a file of the bundle is missing or altered.
        EngineError: ONNX Runtime is missing or cannot run a graph.
        ParityError: all of it in FP32 does not keep the budget either.
    """
    start = time.monotonic()
    manifest = bundle.manifest
    trials = Trials(bundle, weights or {})
    coders = [unit for unit in trials.units if unit in CODERS]
    network = [unit for unit in trials.units if unit not in CODERS]
    planned = 2 + 2 * len(coders) + len(network) + 2 * math.ceil(math.log2(len(network) + 1))
    with Progress("bisecting", planned) as bar:
        trials.advance = bar.advance
        fp32 = {"network": trials.network(network), **{coder: (trials.coder(coder, True),) for coder in coders}}
        _check_fp32(bundle, trials, _joined(fp32), exact=weights is not None)
        rungs = {"network": trials.network(()), **{coder: (trials.coder(coder, False),) for coder in coders}}
        kept, found = dict(rungs), [coder for coder in coders if not _passed(rungs[coder]) or trials.beyond([coder])]
        kept |= {coder: fp32[coder] for coder in found}
        if not _passed(rungs["network"]) or trials.beyond(network):
            order = _by_harm(trials, network, bar)

            def passes(units: Sequence[str]) -> bool:
                rest = [unit for unit in network if unit not in units]
                return _passed(trials.network(units)) and not trials.beyond(rest)

            found += find_shortest(order, passes)
            kept["network"] = trials.network(found)
        found = [unit for unit in trials.units if unit in found]
        findings = tuple(
            Finding(unit, unit_name(unit), trials.reasons(unit), trials.weights_bytes(unit)) for unit in found
        )
    own = [unit for unit in manifest.precision.keep_fp32 if unit not in FP16_KEEPS_FP32]
    nearest: dict[str, tuple[str, float]] = {}
    for one, value in sorted(trials.largest.items(), key=lambda item: -item[1]):
        if one.unit not in found:
            nearest.setdefault(one.unit, (one.name, value))
    return Bisection(
        engine=trials.name,
        rungs=_joined(rungs),
        fp32=_joined(fp32),
        kept=_joined(kept),
        findings=findings,
        keep_fp32=(*own, *found),
        closest=tuple(nearest.values())[:CLOSEST],
        weights_bytes=sum(manifest.files[name].bytes for name in {graph.weights for graph in manifest.graphs.values()}),
        trials=trials.count,
        seconds=round(time.monotonic() - start, 1),
    )


def find_shortest(order: Sequence[str], passes: Callable[[Sequence[str]], bool]) -> tuple[str, ...]:
    """Units that pass together and none of which can be left out, from the beginning of an order.

    All of them are known to pass, and none of them to fail.
    """
    low, high = 0, 1
    while high < len(order) and not passes(order[:high]):
        low, high = high, 2 * high
    high = min(high, len(order))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(order[:middle]) else (middle, high)
    found = tuple(order[:high])
    for unit in found[:-1]:  # without the last one it fails: the search has shown that
        fewer = tuple(other for other in found if other != unit)
        found = fewer if passes(fewer) else found
    return found


def _by_harm(trials: Trials, units: Sequence[str], bar: Progress) -> list[str]:
    harm = {}
    for unit in units:
        harm[unit] = trials.error_alone(unit)
        bar.advance()
    return sorted(units, key=lambda unit: -harm[unit])


def _joined(rungs: Mapping[str, Iterable[Rung]]) -> tuple[Rung, ...]:
    return tuple(rung for each in rungs.values() for rung in each)


def _passed(rungs: Iterable[Rung]) -> bool:
    return all(rung.passed for rung in rungs)


def _check_fp32(bundle: Bundle, trials: Trials, rungs: Sequence[Rung], exact: bool) -> None:
    failed = next((rung for rung in rungs if not rung.passed), None)
    if failed is None:
        return
    problem = (
        f"{bundle.path}: {failed.name} fails with everything in FP32, {failed.text(failed.value)}, limit "
        f"{failed.text(failed.limit)} ({failed.detail})"
    )
    if exact:
        raise ParityError(f"{problem}: not a matter of precision; graphs or records are wrong, export the bundle again")
    lost = "; ".join(str(reason) for unit in trials.units for reason in trials.lost(unit))
    raise ParityError(
        f"{problem}: a fault of the graphs, or what rounding the weights to FP16 lost{f' ({lost})' if lost else ''}; "
        f"name the checkpoint too, for its FP32 weights: dit-export CHECKPOINT --bisect {bundle.path}"
    )


def kernel_cost(
    bundle: Bundle, units: Sequence[str], weights: Mapping[str, Mapping[str, Array]] | None = None
) -> Cost | None:
    """Build the bundle's step and one with these units in FP32, ahead of time; None where TensorRT-RTX is missing.

    Raises:
        BuildError: one of them cannot be built.
    """
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return None
    from dit_engines.build_host import build_host_for
    from dit_engines.compile import compile_graphs
    from dit_engines.recipe import recipe_for

    place = build_host_for("rtx")
    recipe = recipe_for("rtx", place.compute_capability, 1, (2,), rows=1024, library=place.library)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        step = Trials(bundle, weights or {}).island_model("step", units)
        ir.save(step, folder / "step.onnx", external_data="step.weights")
        manifest = bundle.manifest
        files = {
            name: FileSpec((folder / name).stat().st_size, sha256_of(folder / name))
            for name in ("step.onnx", "step.weights")
        }
        graph = replace(manifest.graphs["step"], file="step.onnx", weights="step.weights")
        policy = replace(manifest.precision, keep_fp32=(*manifest.precision.keep_fp32, *units))
        altered = replace(manifest, graphs={**manifest.graphs, "step": graph}, files=files, precision=policy)
        audits = []
        for each in (bundle, replace(bundle, path=folder, manifest=altered)):
            (built,) = compile_graphs(each, recipe, place, ["step"], folder)
            audits.append(built.audit)
    before, after = audits
    return Cost(
        builder=place.in_words(),
        kernels=(before.profiles[0].kernels, after.profiles[0].kernels),
        fused_attention=(before.profiles[0].fused_attention, after.profiles[0].fused_attention),
        weights_bytes=(before.weights_bytes, after.weights_bytes),
    )


def write_keep_list(path: Path, bisection: Bisection, bundle: Bundle) -> None:
    """The file that ``dit-export --keep-fp32`` takes.

    Raises:
        OutputError: it cannot be written.
    """
    reasons = {finding.unit: str(finding) for finding in bisection.findings}
    lines = [
        f"# Units of {bundle.manifest.source.name} to keep in FP32, for dit-export --fp16 --keep-fp32.",
        f"# Found by dit-export --bisect in the bundle with digest {bundle.digest}.",
        *(f"{unit}  # {reasons.get(unit, 'kept already')}" for unit in bisection.keep_fp32),
    ]
    with replace_file(path) as file:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def format_bisection(bisection: Bisection, bundle: Bundle, output: Path) -> str:
    """For people."""
    lines = [
        f"{bundle.path}: {bundle.manifest.precision.name} on {bisection.engine}, {bisection.trials} trials in "
        f"{bisection.seconds:.0f} s"
    ]
    columns = {"as it is": bisection.rungs, "all FP32": bisection.fp32}
    if bisection.findings:
        columns["kept FP32"] = bisection.kept
    lines.append("  ".join([f"{'rung':<24}", *(f"{title:>10}" for title in (*columns, "limit"))]))
    for rung, *all_of_it in zip(bisection.rungs, *columns.values(), strict=True):
        values = [*(rung.text(each.value) for each in all_of_it), rung.text(rung.limit)]
        verdict = "pass" if rung.passed else f"FAIL  {rung.first_over or ''}".rstrip()
        lines.append("  ".join([f"{rung.name:<24}", *(f"{value:>10}" for value in values), verdict]))
    if bisection.findings:
        lines.append("to keep in FP32:")
        lines += [f"  {finding.unit:<20} {finding}" for finding in bisection.findings]
        more = sum(finding.weights_bytes for finding in bisection.findings)
        share = f"{more / bisection.weights_bytes:.1%} of the bundle's {bisection.weights_bytes / 1e6:.1f} MB"
        lines.append(f"cost: weights +{more / 1e6:.2f} MB ({share})" + _kernels(bisection.cost))
    else:
        lines.append("nothing breaks the budget: no unit needs to be kept in FP32")
    if bisection.closest:
        near = (f"{name} {value:.3g} ({value / FP16_MAX:.2%})" for name, value in bisection.closest)
        lines.append(f"closest to FP16's range: {'; '.join(near)}")
    lines.append(TRIALS)
    if bisection.findings:
        lines.append(f"{output}: now dit-export CHECKPOINT --fp16 --keep-fp32 {output}")
    return "\n".join(lines)


def _kernels(cost: Cost | None) -> str:
    if cost is None:
        return ""
    return (
        f"; a guided step {cost.kernels[0]} → {cost.kernels[1]} kernels, fused attention {cost.fused_attention[0]} → "
        f"{cost.fused_attention[1]} ({cost.builder}, ahead of time)"
    )
