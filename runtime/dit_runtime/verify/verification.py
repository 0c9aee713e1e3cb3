"""Replay a bundle's golden records on an engine and compare the results, from the bottom up.

The first rung that fails says where the fault is:

    FP16 range                              the reference's own numbers fit into FP16
    INT8 ranges, INT8 weights               an INT8 or FP8 bundle's scales and numbers are those of its calibration
    conditioner, embedding, blocks          a block's inputs, and its output
    forward                                 the network with and without guidance, at every batch size of the engine
    sampler update                          every coefficient that a schedule's row can hold
    noise, teacher-forced, free-running     the sampler: its noise, its single steps, whole trajectories
    decoder, uint8 images, image …          the autoencoder's decoder, and the images
    encoder                                 the autoencoder's encoder
    classes, batches, branches, …           relations, which carry the above to inputs that no record has

The records hold what the unpatched PyTorch reference computed in FP32. The limits and PyTorch's own errors come with
the bundle (``dit_runtime.verify.budget``). Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dit_runtime.backends.base import Array, Engine
from dit_runtime.bundle.manifest import ENCODER, DiffusionSpec
from dit_runtime.bundle.precision import QUANTIZED, Precision
from dit_runtime.bundle.reader import CONDITIONS, STRONG, UNGUIDED, Bundle
from dit_runtime.core.errors import BundleError
from dit_runtime.core.progress import Progress
from dit_runtime.samplers.by_name import schedule_for
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.verify import image_rungs, network_rungs, quantization_rungs
from dit_runtime.verify.conditions import conditions
from dit_runtime.verify.coverage import coverage_of
from dit_runtime.verify.decoder_relations import decoder_batches, encoder_batches
from dit_runtime.verify.effort import Effort, effort_for
from dit_runtime.verify.loop_relations import mixed_batch
from dit_runtime.verify.replay import Replay
from dit_runtime.verify.rung import Rung, Verification
from dit_runtime.verify.step_relations import StepRelations


def trajectories_of(diffusion: DiffusionSpec) -> tuple[str, ...]:
    """The samplers whose trajectories are recorded: a deterministic one, and one that draws noise, if there is."""
    if diffusion.second_time is not None:
        return ("meanflow",)
    return ("euler", "sde-euler") if diffusion.path else ("ddim", "ddpm")


def verify(bundle: Bundle, engine: Engine, quick: bool = False) -> Iterator[Rung]:
    """The rungs from the bottom up; each rung is yielded when it is measured.

    ``quick`` leaves out the conditioner's rung and the teacher-forced steps, which say where a fault is rather than
    whether there is one, and the trajectory without guidance. Embedding and blocks need the probe graph, which TensorRT
    engines do not have. An engine built without guidance has only the trajectory without guidance, and no images. An
    engine built for tiles decodes a recorded tile.

    Raises:
        BundleError: a record is missing or altered, or the bundle has no limits for the engine's precision.
        EngineError: the engine cannot run a graph, or the bundle has no record of its tiles.
    """
    return _rungs(Replay(bundle, engine), quick, [])


def verification_of(bundle: Bundle, engine: Engine, quick: bool = False) -> Verification:
    """All rungs of ``verify``, the images and the reference's largest values, with a progress bar."""
    replay = Replay(bundle, engine)
    images: list[tuple[Array, Array]] = []
    rungs = []
    with Progress(f"verifying on {engine.info.name}", _rung_count(replay, quick)) as bar:
        for rung in _rungs(replay, quick, images):
            rungs.append(rung)
            bar.advance()
    manifest = bundle.manifest
    return Verification(
        bundle=bundle.digest,
        model=manifest.source.name,
        precision=replay.budget.precision,
        reference=manifest.source.reference,
        engine=engine.info.name,
        image_size=manifest.image_size,
        quick=quick,
        rungs=tuple(rungs),
        images=images[0] if images else None,
        magnitudes=manifest.magnitudes,
        guidance=_strongest_guidance(replay, [rung.name for rung in rungs]),
        actions=not manifest.has_decoder,
        coverage=coverage_of(replay.visits, engine.info, manifest, bundle.has_records(CONDITIONS)),
    )


def _rungs(replay: Replay, quick: bool, images: list[tuple[Array, Array]]) -> Iterator[Rung]:
    """The rungs in their order. Appends the engine's images and the reference's images to ``images``."""
    manifest, guided = replay.bundle.manifest, replay.engine.info.has_branches(2)
    if _has_range(replay):
        yield network_rungs.fp16_range(replay)
    if manifest.calibration is not None:
        yield quantization_rungs.ranges(replay)
        yield quantization_rungs.weights(replay)
    if not quick:
        yield network_rungs.conditioner(replay)
    if _has_probe(replay):
        if manifest.model.conditioning == "adaln-zero":  # the blocks of other conditionings have no gates to close
            yield network_rungs.embedding(replay)
        yield network_rungs.blocks(replay)
        replay.engine.release("probe")
    for branches in (1, 2)[: 1 + guided]:
        yield from network_rungs.forward(replay, branches)
    yield network_rungs.update(replay)
    first, *_ = samplers = trajectories_of(manifest.diffusion)
    for sampler in samplers:
        record, schedule = recorded_trajectory(replay, sampler, sampler)
        yield image_rungs.noise(replay, sampler, record, schedule)
        if not guided:
            continue  # these trajectories are guided
        if not quick:
            yield image_rungs.teacher_forced(replay, sampler, record, schedule)
        latents, rung = image_rungs.free_running(replay, sampler, record, schedule)
        yield rung
        if sampler == first:
            final = latents
    if not (quick and guided):
        record, schedule = recorded_trajectory(replay, samplers[-1], UNGUIDED)
        yield image_rungs.free_running(replay, samplers[-1], record, schedule)[1]
    if manifest.has_decoder:
        yield image_rungs.decoder(replay)
        yield image_rungs.quantized(replay)
    if guided and manifest.has_decoder:
        both, rungs = image_rungs.images(replay, final, first)
        images.append(both)
        yield from rungs
        if _has_cost(replay):
            yield quantization_rungs.cost(replay, both[0])
        if _has_strong(replay):
            record, schedule = recorded_trajectory(replay, first, STRONG)
            strong, rung = image_rungs.free_running(replay, first, record, schedule)
            yield rung
            if replay.tile is None:
                yield image_rungs.strong_images(replay, strong, record, first)
    if ENCODER in manifest.graphs:
        yield image_rungs.encoder(replay)
    yield from relations(replay, effort_for(manifest.model, quick))


def verify_shape(bundle: Bundle, engine: Engine, batch: int, branches: int) -> list[Rung]:
    """The relations of the step at one shape, which the verification of an engine did not visit."""
    effort = replace(effort_for(bundle.manifest.model, quick=True), batches={branches: (batch,)})
    step = StepRelations(Replay(bundle, engine), effort, [(batch, branches)])
    step.visit()
    rungs = list(step.rungs())
    if engine.info.loop_on_device:
        rungs.append(mixed_batch(step.replay, replace(effort, mixed=(1,)), [(batch, branches)]))
    return rungs


def relations(replay: Replay, effort: Effort) -> Iterator[Rung]:
    """What follows from the rungs above for inputs that no record has, from the bottom up."""
    yield from conditions(replay, effort)
    step = StepRelations(replay, effort)
    step.visit()
    yield from step.rungs()
    yield mixed_batch(replay, effort, step.shapes)
    if replay.bundle.manifest.has_decoder:
        yield from decoder_batches(replay, effort)
    if ENCODER in replay.bundle.manifest.graphs:
        yield encoder_batches(replay, effort)


def _strongest_guidance(replay: Replay, names: Sequence[str]) -> float:
    """The largest guidance scale of the trajectories that were compared with the reference."""
    samplers = trajectories_of(replay.bundle.manifest.diffusion)
    records = {
        **{f"{sampler} free-running": sampler for sampler in samplers},
        f"{samplers[0]} free-running, strong": STRONG,
    }
    scales = [float(replay.bundle.records(record)["guidance"]) for name, record in records.items() if name in names]
    return max(scales, default=1.0)


def recorded_trajectory(replay: Replay, sampler: str, name: str) -> tuple[image_rungs.Record, Schedule]:
    """A recorded trajectory of a sampler, and the sampler's schedule."""
    record, manifest = replay.bundle.records(name), replay.bundle.manifest
    schedule = schedule_for(sampler, manifest.model, manifest.diffusion, int(record["steps"]))
    if len(schedule) != len(record["denoised"]):
        raise BundleError(
            f"{replay.bundle.path}: the golden record {name} has {len(record['denoised'])} evaluations of "
            f"{int(record['steps'])} steps, expected {len(schedule)}; copy or export the bundle again"
        )
    return record, schedule


def _has_strong(replay: Replay) -> bool:
    return replay.bundle.has_records(STRONG) and replay.engine.info.has_branches(2)


def _has_range(replay: Replay) -> bool:
    manifest = replay.bundle.manifest
    # The decoder of a BF16 bundle is FP16.
    bf16 = manifest.precision.name == Precision.BF16 and "decoder" in manifest.graphs
    return bool(manifest.magnitudes) and (bf16 or replay.budget.precision in (Precision.FP16, *QUANTIZED))


def _has_cost(replay: Replay) -> bool:
    return replay.bundle.manifest.calibration is not None and replay.tile is None


def _has_probe(replay: Replay) -> bool:
    return "probe" in replay.engine.info.graphs


def _rung_count(replay: Replay, quick: bool) -> int:
    """The number of rungs, for the progress bar."""
    manifest, guided = replay.bundle.manifest, replay.engine.info.has_branches(2)
    probed = _has_probe(replay) * (1 + (manifest.model.conditioning == "adaln-zero"))
    samplers = len(trajectories_of(manifest.diffusion))
    # The forward and its variance; update and the samplers' noise; with guidance their trajectories.
    always = _has_range(replay) + probed + (1 + guided) * (1 + manifest.model.learned_variance) + 1 + samplers
    always += samplers * guided
    # Decoder, uint8 images and the decoder's batches; with guidance the four rungs of images.
    always += (4 + 4 * guided) * manifest.has_decoder
    unguided = not (quick and guided)
    # Conditioner's calls; batches, rows, samplers and the repeated call of the step; the loop; with guidance the step's
    # batches, branches and scales.
    relations = replay.bundle.has_records(CONDITIONS) + 6 + 3 * guided
    strong = _has_strong(replay) * (1 + (replay.tile is None))
    encoder = strong + 2 * (ENCODER in manifest.graphs)
    always += 2 * (manifest.calibration is not None) + (_has_cost(replay) and guided)
    return always + unguided + relations + encoder + (1 + samplers * guided) * (not quick)
