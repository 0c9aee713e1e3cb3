"""From a checkpoint to a bundle: convert, trace, record, describe, and only then put it in place."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from dit_export.autoencoder import Decoder
from dit_export.checkpoint import Checkpoint, load_checkpoint
from dit_export.golden import REFERENCE, records_in_process
from dit_export.graphs import write_graphs
from dit_export.model import Conditioner, Numerics, Step, conditioner_from_diffusers, step_from_diffusers
from dit_export.precision import Precision
from dit_export.tolerances import TOLERANCES
from dit_runtime.bundle import (
    GRAPHS,
    MANIFEST,
    SCHEMA,
    Bundle,
    DefaultsSpec,
    FileSpec,
    Manifest,
    PrecisionSpec,
    SourceSpec,
    open_bundle,
)
from dit_runtime.errors import OutputError
from dit_runtime.files import check_writable, replaced_folder, sha256_of
from dit_runtime.progress import Progress

# DiTPipeline's default guidance scale, with the 50 DDIM steps that its scheduler is used with.
DEFAULTS = DefaultsSpec(sampler="ddim", steps=50, guidance=4.0)


@dataclass(frozen=True)
class Source:
    """What to export: a folder, hub id or preset, and the seed of random weights for the latter."""

    name: str
    random_seed: int | None = None


def bundle_from_checkpoint(source: Source, output: Path, precision: Precision) -> Bundle:
    """Export ``source`` to the folder ``output``, replacing a bundle that is there.

    Golden records come first, from a process of their own, so that its memory is free again for tracing.

    Raises:
        CheckpointError: the source cannot be read or is not supported.
        OutputError: ``output`` cannot be written, or holds something that is not a bundle.
        ParityError: the PyTorch reference itself is unusable.
    """
    if output.exists() and not (output / MANIFEST).is_file():
        raise OutputError(f"{output}: exists and is not a bundle, so it is not replaced; choose another --output")
    check_writable(output)
    with replaced_folder(output) as folder:
        golden = folder / "golden"
        golden.mkdir()
        records_in_process(source.name, source.random_seed, golden)
        with Progress("loading", 1 + len(GRAPHS)) as bar:
            checkpoint = load_checkpoint(source.name, source.random_seed)
            manifest = _manifest(checkpoint, precision)
            modules = _converted(checkpoint, precision)
            del checkpoint  # at XL's size the reference's 3 GB are wanted back before tracing
            bar.describe("tracing")
            bar.advance()
            graphs = {}
            for name, graph in write_graphs(folder, *modules, manifest.autoencoder.image_size):
                graphs[name] = graph
                bar.advance()
        manifest = replace(manifest, graphs=graphs, files=_files(folder))
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return open_bundle(output)


def _converted(checkpoint: Checkpoint, precision: Precision) -> tuple[Conditioner, Step, Decoder]:
    transformer, spec, numerics = checkpoint.transformer, checkpoint.model, numerics_of(checkpoint)
    # The positional table is a buffer that state_dict() leaves out.
    state = {**dict(transformer.named_parameters()), **dict(transformer.named_buffers())}
    conditioner = conditioner_from_diffusers(spec, numerics, precision, state)
    step = step_from_diffusers(spec, numerics, precision, state)
    return conditioner, step, Decoder(checkpoint.autoencoder, precision).eval().requires_grad_(False)


def numerics_of(checkpoint: Checkpoint) -> Numerics:
    """diffusers' numerics, with the one number that its configuration sets."""
    return Numerics(mlp_eps=checkpoint.transformer.config.norm_eps)


def _manifest(checkpoint: Checkpoint, precision: Precision) -> Manifest:
    packages = ("dit-export", "torch", "diffusers", "onnx-ir")
    return Manifest(
        schema=SCHEMA,
        producer={**{name: version(name) for name in packages}, "python": platform.python_version()},
        source=SourceSpec(checkpoint.name, checkpoint.revision, REFERENCE, checkpoint.weights_sha256),
        model=checkpoint.model,
        diffusion=checkpoint.diffusion,
        autoencoder=checkpoint.autoencoder_spec,
        precision=PrecisionSpec(precision.name, precision.keep_fp32),
        defaults=DEFAULTS,
        class_names=checkpoint.class_names,
        graphs={},
        tolerances=TOLERANCES[precision.name],
    )


def _files(folder: Path) -> dict[str, FileSpec]:
    """Size and hash of every file written so far, in a stable order."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): FileSpec(path.stat().st_size, sha256_of(path)) for path in paths}
