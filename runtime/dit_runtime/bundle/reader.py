"""Open a bundle, the folder that ``dit-export`` writes and all other commands read.

    manifest.json          model, diffusion, graphs, precision, error budget, and size and SHA-256 of every other file
    graphs/*.onnx          conditioner, step, probe, decoder and maybe encoder, each with its weights beside it; the
                           probe uses the step's weights; each further size has its own step and probe, on the same
                           weights
    golden/*.npz           the results of the PyTorch reference; each further size has its own folder
    engines/               the engine store, which other commands add; not part of the bundle's digest

A bundle is untrusted. No file of it is opened before its size and hash match the manifest, and no path in it may lead
outside the folder. In a hub cache its files are links to the cache's blobs, which is allowed.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dit_runtime.bundle.consistency import check_consistency
from dit_runtime.bundle.graph_file import check_graph
from dit_runtime.bundle.manifest import (
    CONDITIONINGS,
    ENCODER,
    GRAPHS,
    PATHS,
    SCHEMA,
    SIZED_GRAPHS,
    AutoencoderSpec,
    DefaultsSpec,
    DiffusionSpec,
    FileSpec,
    GraphSpec,
    Manifest,
    ModelSpec,
    PrecisionSpec,
    SourceSpec,
    TensorSpec,
    manifest_from_json,
    name_for_size,
)
from dit_runtime.bundle.records import (
    CALIBRATION,
    CONDITIONS,
    OBSERVATIONS,
    RECORD_BYTES,
    STRONG,
    TILE,
    UNGUIDED,
    UNQUANTIZED,
    check_record,
    specs_of_record,
)
from dit_runtime.core.arrays import arrays_from_npz
from dit_runtime.core.decode import json_from_bytes, schema_of
from dit_runtime.core.errors import BundleError, OutputError
from dit_runtime.core.files import add_name, sha256_of
from dit_runtime.core.reading import (
    GRAPH_BYTES,
    MANIFEST_BYTES,
    FileError,
    kind_of,
    leads_outside,
    open_file,
    read_file,
)
from dit_runtime.core.replace import check_place, recover_folder

__all__ = [
    "CALIBRATION",
    "CONDITIONINGS",
    "CONDITIONS",
    "ENCODER",
    "ENGINES",
    "GOLDEN",
    "GRAPHS",
    "MANIFEST",
    "OBSERVATIONS",
    "PATHS",
    "SCHEMA",
    "SIZED_GRAPHS",
    "STRONG",
    "TILE",
    "UNGUIDED",
    "UNQUANTIZED",
    "AutoencoderSpec",
    "Bundle",
    "DefaultsSpec",
    "DiffusionSpec",
    "FileSpec",
    "GraphSpec",
    "Manifest",
    "ModelSpec",
    "PrecisionSpec",
    "SourceSpec",
    "TensorSpec",
    "manifest_from_json",
    "name_for_size",
    "open_bundle",
]

MANIFEST = "manifest.json"
ENGINES = "engines"
PLAIN = "plain"  # in the engine store: hard links to the graphs of a bundle whose files are links
GOLDEN = "golden"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, at one of its sizes.

    Attributes:
        path: the bundle's folder.
        manifest: the manifest, with ``model.latent_size`` and the graphs of the size in use.
        digest: the SHA-256 of the manifest file, which holds the hash of every other file.
        default_size: whether the size in use is the bundle's first.
        store: the engine store, where engines, verdicts and timings are kept; None is the bundle's own ``engines``
            folder.
    """

    path: Path
    manifest: Manifest
    digest: str
    default_size: bool = True
    store: Path | None = None

    @property
    def engines(self) -> Path:
        """The folder of the engine store."""
        return self.store or self.path / ENGINES

    def at(self, image_size: tuple[int, int] | None) -> Bundle:
        """The bundle at another of its sizes.

        Args:
            image_size: height and width of an image in pixels; None keeps the size in use.

        Raises:
            BundleError: the bundle has no graphs for that size, or is open at another size than its first.
        """
        manifest = self.manifest
        if image_size is None or image_size == manifest.image_size:
            return self
        if not self.default_size:
            raise BundleError(
                f"{self.path}: is open at {manifest.image_size[0]}x{manifest.image_size[1]} already; open the bundle "
                f"again for {image_size[0]}x{image_size[1]}"
            )
        if image_size not in manifest.image_sizes:
            if manifest.model.observation:
                raise BundleError(f"{self.path}: is a policy's bundle, whose actions have one size; leave --size out")
            known = ", ".join(f"{height}x{width}" for height, width in manifest.image_sizes)
            raise BundleError(
                f"{self.path}: has no graphs for images of {image_size[0]}x{image_size[1]}, only for {known}; export "
                f"the bundle with --size {image_size[0]}x{image_size[1]}"
            )
        size = manifest.sizes[manifest.image_sizes.index(image_size)]
        graphs = {**manifest.graphs, **{name: manifest.graphs[name_for_size(name, size)] for name in SIZED_GRAPHS}}
        return replace(
            self,
            manifest=replace(manifest, model=replace(manifest.model, latent_size=size), graphs=graphs),
            default_size=False,
        )

    def file(self, name: str) -> Path:
        """The path of a file of the bundle, with its size and SHA-256 checked against the manifest.

        Raises:
            BundleError: the manifest does not name the file, or the file is missing, altered or a link out of the
                bundle; or the bundle was replaced after it was opened.
        """
        try:
            return self._check_file(name)
        except BundleError:
            self.check_in_place()
            raise

    def check_in_place(self) -> None:
        """Check that the folder still holds this bundle, and not another one that an export put in its place.

        Raises:
            BundleError: the manifest is of another bundle, so files that were opened by name may be of either.
        """
        try:
            found = sha256_of(self.path / MANIFEST, MANIFEST_BYTES, within=self.path)
        except FileError:
            return  # it is missing, and whoever needs it says so
        if found != self.digest:
            raise BundleError(f"{self.path}: was replaced by another export while it was in use; run the command again")

    def _check_file(self, name: str) -> Path:
        spec = self.manifest.files.get(name)
        if spec is None:
            raise BundleError(f"{self.path}: the manifest names no file {name!r}; export the bundle again")
        path = self.path.joinpath(*PurePosixPath(name).parts)
        if leads_outside(self.path, path):
            raise BundleError(f"{path}: is a link out of the bundle; a bundle must hold its own files")
        if kind_of(path) is None:
            raise BundleError(f"{path}: missing, but named in {MANIFEST}; copy or export the bundle again")
        try:
            with open_file(path, None, within=self.path) as file:
                if (size := os.fstat(file.fileno()).st_size) != spec.bytes:
                    raise FileError(f"{size} bytes, expected {spec.bytes}")
            found = sha256_of(path, spec.bytes, within=self.path)
        except FileError as error:
            raise BundleError(f"{path}: {error}; copy or export the bundle again") from error
        if found != spec.sha256:
            raise BundleError(
                f"{path}: altered (SHA-256 {found[:12]}…, expected {spec.sha256[:12]}…); copy the bundle again"
            )
        return path

    def graph(self, name: str) -> Path:
        """The path of a graph's ONNX file, with that file and the graph's weights checked. Raises as ``structure``.

        In a hub cache it is another name of the file, in the engine store: most libraries refuse weights behind a link.
        """
        spec = self.manifest.graphs[name]
        weights, path = self.file(spec.weights), self.structure(name)
        if not (weights.is_symlink() or path.is_symlink()):
            return path
        plain = self.engines / PLAIN / self.digest[:16]
        named = {name: plain.joinpath(*PurePosixPath(name).parts) for name in (spec.weights, spec.file)}
        try:
            for file, other in ((weights, named[spec.weights]), (path, named[spec.file])):
                check_place(other, self.engines)
                add_name(file, other)
        except (OSError, OutputError):
            return path  # a store that cannot be written: some libraries do follow the links
        return named[spec.file]

    def structure(self, name: str) -> Path:
        """The path of a graph's ONNX file, checked; the weights beside it are not.

        Raises:
            BundleError: as ``file``, or the file holds what no library should see (``bundle/graph_file.py``).
        """
        spec = self.manifest.graphs[name]
        path = self.file(spec.file)
        try:
            content = read_file(path, GRAPH_BYTES, within=self.path)
            check_graph(content, spec, self.manifest.files[spec.weights].bytes, self.manifest)
        except FileError as error:
            self.check_in_place()
            raise BundleError(f"{path}: not a graph of a bundle ({error}); copy or export the bundle again") from error
        return path

    def records(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays of a golden record by name: ``golden/NAME.npz``, at the size in use.

        Raises:
            BundleError: as ``file``, or its arrays are not those of such a record (``bundle/records.py``).
        """
        path = self.file(self._file_of_record(name))
        try:
            with open_file(path, RECORD_BYTES, within=self.path) as file:
                record = arrays_from_npz(file, specs_of_record(name, self.manifest), RECORD_BYTES)
            check_record(name, record, self.manifest)
        except (FileError, OSError) as error:
            self.check_in_place()
            raise BundleError(f"{path}: not a golden record ({error}); copy or export the bundle again") from error
        self.check_in_place()
        return record

    def has_records(self, name: str) -> bool:
        """Whether the bundle has a golden record of that name, at the size in use."""
        return self._file_of_record(name) in self.manifest.files

    def _file_of_record(self, name: str) -> str:
        folder = GOLDEN if self.default_size else name_for_size(GOLDEN, self.manifest.model.latent_size)
        return f"{folder}/{name}.npz"

    def check(self) -> None:
        """Check every file against the manifest, and the structure of every graph. Raises as ``structure``."""
        for name in self.manifest.files:
            self.file(name)
        for name in self.manifest.graphs:
            self.structure(name)


def open_bundle(path: str | Path, store: Path | None = None) -> Bundle:
    """Read and check a bundle's manifest. The other files are checked when they are used.

    Args:
        path: the bundle's folder.
        store: the engine store, for a bundle that cannot be written; None is the bundle's own ``engines`` folder.

    Raises:
        BundleError: the folder is no bundle, or its manifest is damaged, inconsistent or of another schema.
    """
    folder = Path(path)
    recover_folder(folder)
    manifest_path = folder / MANIFEST
    if kind_of(folder) is None:
        raise BundleError(f"{folder}: no such bundle; make one with dit-export CHECKPOINT -o {folder}")
    if kind_of(manifest_path) is None:
        raise BundleError(f"{folder}: not a bundle (no {MANIFEST}); make one with dit-export CHECKPOINT -o {folder}")
    if store is None and leads_outside(folder, folder / ENGINES):
        raise BundleError(
            f"{folder / ENGINES}: is a link out of the bundle; remove it, or name the folder that you mean with --store"
        )
    try:
        text = read_file(manifest_path, MANIFEST_BYTES, within=folder)
        raw = json_from_bytes(text)
        schema = schema_of(raw)
    except FileError as error:
        raise BundleError(f"{manifest_path}: not a manifest ({error}); copy or export the bundle again") from error
    if schema != SCHEMA:
        raise BundleError(
            f"{manifest_path}: schema {schema}, this version reads {SCHEMA}; export the bundle again or install the "
            "dit-export that wrote it"
        )
    try:
        manifest = manifest_from_json(raw)
        check_consistency(manifest)
    except ValueError as error:
        raise BundleError(f"{manifest_path}: damaged manifest ({error}); copy or export the bundle again") from error
    return Bundle(folder, manifest, hashlib.sha256(text).hexdigest(), store=store)
