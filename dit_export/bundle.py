"""From a checkpoint to a bundle: golden records, graphs and a manifest in a new folder, which then moves into place."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from dit_export.checkpoints.sources import Checkpoint, Source, load_checkpoint
from dit_export.graphs.autoencoder import Decoder, Encoder
from dit_export.graphs.from_weights import conditioner_from_weights, official_linear, step_from_weights
from dit_export.graphs.precision import check_units
from dit_export.graphs.quantize import quantize_step
from dit_export.graphs.smoothing import SmoothedWeights
from dit_export.graphs.tracing import (
    write_conditioner,
    write_decoder,
    write_encoder,
    write_steps,
)
from dit_export.reference.calibration import spec_for_checkpoint
from dit_export.reference.process import records_in_process
from dit_export.reference.record_settings import CalibrationRequest, Measurements
from dit_runtime.bundle.manifest import (
    ENCODER,
    SCHEMA,
    SIZED_GRAPHS,
    FileSpec,
    GraphSpec,
    Manifest,
    PrecisionSpec,
    SourceSpec,
)
from dit_runtime.bundle.precision import QUANTIZED
from dit_runtime.bundle.quantization import FORMATS, CalibrationSpec, factors_by_layer, linears_of, stores_factors
from dit_runtime.bundle.reader import CALIBRATION, ENGINES, GOLDEN, MANIFEST, Bundle, open_bundle
from dit_runtime.core.decode import DecodeError, decode, read_json, replace_controls
from dit_runtime.core.errors import CheckpointError, OutputError
from dit_runtime.core.files import sha256_of
from dit_runtime.core.progress import Progress
from dit_runtime.core.reading import MANIFEST_BYTES
from dit_runtime.core.replace import check_writable, recover_folder, replace_folder
from dit_runtime.samplers.by_name import count_default_steps
from dit_runtime.verify.limits import THRESHOLDS, TOLERANCES, limits_for_bundle


def bundle_from_checkpoint(
    source: Source,
    output: Path,
    precision: PrecisionSpec,
    encoder: bool = False,
    calibration: CalibrationRequest | None = None,
) -> Bundle:
    """Export a checkpoint to a bundle.

    Golden records come first, from a process of their own, so that its memory is free again for tracing. Then one graph
    is in memory at a time. The bundle appears when it is complete; an error or an interrupt leaves nothing behind.

    Args:
        source: the checkpoint.
        output: the bundle's folder; a bundle that is there is replaced.
        precision: the precision policy of the graphs.
        encoder: whether the autoencoder's encoder is exported too, for image-to-image.
        calibration: how an export in INT8 or FP8 is calibrated.

    Raises:
        CheckpointError: the source cannot be read or is not supported.
        OutputError: ``output`` cannot be written, or holds something that is not a bundle.
        ParityError: the PyTorch reference itself is unusable.
        BundleError: PyTorch traced the model to operators that no bundle's graph may have.
    """
    check_writable(output)
    recover_folder(output)
    check_replaceable(output)
    checkpoint = load_checkpoint(source)  # a mistake is reported before the work
    check_units(precision, checkpoint.model)
    check_parts_of_export(checkpoint, precision, encoder)
    if calibration is not None:
        spec_for_checkpoint(checkpoint, calibration)
    with replace_folder(output) as folder:
        measurements = records_in_process(source, folder, encoder, precision.name, calibration)
        with Progress("tracing", 2 + encoder + len(SIZED_GRAPHS) * len(checkpoint.sizes)) as bar:
            graphs = {}
            for name, graph in write_graphs(checkpoint, precision, folder, encoder):
                graphs[name] = graph
                bar.advance()
        manifest = replace(
            _make_manifest(checkpoint, precision, measurements), graphs=graphs, files=_hash_files(folder)
        )
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        written = open_bundle(folder)
        for name in graphs:  # so that no bundle is made that no command would open
            written.structure(name)
        check_replaceable(output)  # again: an export may take hours
    return open_bundle(output)


def check_parts_of_export(checkpoint: Checkpoint, precision: PrecisionSpec, encoder: bool) -> None:
    """Check that a policy is not asked for what it does not have. Raises CheckpointError if it is."""
    if checkpoint.autoencoder is None and (encoder or precision.name in QUANTIZED):
        raise CheckpointError(
            f"{checkpoint.name}: is a policy; it has no encoder, and INT8 and FP8 are not supported for it: leave "
            "--encoder, --int8 and --fp8 out (--fp16 is)"
        )


def check_replaceable(output: Path) -> None:
    """Check that an export may replace what is at ``output``: nothing, or a bundle, even a damaged one.

    ``manifest.json`` is a common name. So a folder is a bundle when its manifest says so, or when it holds nothing else
    than bundles do.

    Raises:
        OutputError: something else is there.
    """
    if output.is_symlink():
        raise OutputError(f"{output}: is a link, so it is not replaced; choose --output {output.resolve()}")
    if not output.exists():
        return
    if not (output / MANIFEST).is_file() or not (_names_a_bundle(output / MANIFEST) or _holds_only_a_bundle(output)):
        raise OutputError(f"{output}: exists and is not a bundle, so it is not replaced; choose another --output")


def _names_a_bundle(manifest: Path) -> bool:
    try:
        found = read_json(manifest, MANIFEST_BYTES)
    except DecodeError:
        return False
    return isinstance(found, dict) and {"schema", "producer", "graphs", "files"} <= set(found)


def _holds_only_a_bundle(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return all(name in (MANIFEST, "graphs", ENGINES) or name.partition("-")[0] == GOLDEN for name in names)


def write_graphs(
    checkpoint: Checkpoint, precision: PrecisionSpec, folder: Path, encoder: bool
) -> Iterator[tuple[str, GraphSpec]]:
    """Trace and write the graphs one by one; yield the name and description of each graph when it is written."""
    spec, numerics = checkpoint.model, checkpoint.numerics
    weights: Mapping[str, torch.Tensor] = checkpoint.weights
    edit: Callable[[ir.Model], None] | None = None
    if precision.name in QUANTIZED:
        weights, edit = _quantization_of(checkpoint, precision, folder)
    conditioner = conditioner_from_weights(spec, numerics, precision, weights)
    table_dtype = conditioner.table_dtype
    yield "conditioner", write_conditioner(folder, conditioner)
    del conditioner  # a third of the weights: they must not be in memory beside the step's
    positions = {size: checkpoint.positions(size) for size in checkpoint.sizes}
    step = step_from_weights(spec, numerics, precision, weights, positions[spec.latent_size])
    yield from write_steps(folder, step, table_dtype, positions, edit)
    del step
    if (autoencoder := checkpoint.autoencoder) is None:
        return
    yield "decoder", write_decoder(folder, Decoder(autoencoder, precision).eval().requires_grad_(False))
    if encoder:
        yield ENCODER, write_encoder(folder, Encoder(autoencoder, precision).eval().requires_grad_(False))


def _quantization_of(
    checkpoint: Checkpoint, precision: PrecisionSpec, folder: Path
) -> tuple[SmoothedWeights, Callable[[ir.Model], None]]:
    """The weights of an INT8 or FP8 bundle, and what writes its products into a traced step, by its calibration."""
    model = checkpoint.model
    with np.load(folder / GOLDEN / f"{CALIBRATION}.npz", allow_pickle=False) as record:
        found, recorded = [float(scale) for scale in record["scales"]], record["factors"]
    factors = factors_by_layer(recorded, model.conditioning, model.width, model.mlp_width)
    linears = linears_of(model.conditioning, model.depth)
    scales = {name: scale for name, scale in zip(linears, found, strict=True) if precision.quantizes(name)}
    factors = {name: each for name, each in factors.items() if name in scales}
    weights = SmoothedWeights(
        model, checkpoint.weights, {name: torch.from_numpy(each.copy()) for name, each in factors.items()}
    )
    stored = {name: each for name, each in factors.items() if stores_factors(model.conditioning, name)}

    def weight(name: str) -> NDArray[np.float32]:
        matrix: NDArray[np.float32] = weights[f"{official_linear(model, name)}.weight"].float().numpy()
        return matrix

    return weights, lambda traced: quantize_step(traced, scales, stored, weight, FORMATS[precision.name])


def _make_manifest(checkpoint: Checkpoint, precision: PrecisionSpec, measurements: Measurements) -> Manifest:
    reference = checkpoint.reference
    if precision.name in QUANTIZED:
        reference += f", its blocks' linear layers in emulated {precision.name.upper()}"
    packages = ("dit-export", "torch", "diffusers", "onnx-ir")
    return Manifest(
        schema=SCHEMA,
        producer={**{name: version(name) for name in packages}, "python": platform.python_version()},
        source=SourceSpec(replace_controls(checkpoint.name), checkpoint.revision, reference, checkpoint.weights_sha256),
        model=checkpoint.model,
        sizes=checkpoint.sizes,
        diffusion=checkpoint.diffusion,
        autoencoder=checkpoint.autoencoder_spec,
        precision=precision,
        defaults=replace(
            checkpoint.defaults,
            steps=count_default_steps(
                checkpoint.defaults.sampler, checkpoint.model, checkpoint.diffusion, checkpoint.defaults.steps
            ),
        ),
        class_names=tuple(map(replace_controls, checkpoint.class_names)),
        graphs={},
        tolerances=_limits_for(precision, TOLERANCES),
        thresholds=_limits_for(precision, THRESHOLDS),
        floors={
            name: {record: tuple(values) for record, values in series.items()}
            for name, series in measurements.floors.items()
        },
        magnitudes=measurements.magnitudes,
        calibration=None if measurements.calibration is None else decode(CalibrationSpec, measurements.calibration),
    )


def _limits_for(precision: PrecisionSpec, limits: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The limits of the precisions that a bundle's engines may compute in."""
    return {name: dict(own) for name, own in limits_for_bundle(limits, precision.name).items()}


def _hash_files(folder: Path) -> dict[str, FileSpec]:
    """Size and hash of every file in a folder, by relative path, in alphabetical order."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): FileSpec(path.stat().st_size, sha256_of(path)) for path in paths}
