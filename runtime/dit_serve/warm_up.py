"""Open an engine for batches that change all the time, and run it at each of them before anybody waits for it."""

from __future__ import annotations

from dit_runtime.backends.openvino.engine import ANY_BATCH
from dit_runtime.bundle.reader import Bundle
from dit_runtime.pipeline import Pipeline
from dit_runtime.samplers.by_name import samplers_for
from dit_runtime.samplers.guidance import is_guidable
from dit_runtime.sampling.batch import Batch
from dit_runtime.verify.auto import AUTO, choose_engine

GUIDANCE = {1: 1.0, 2: 2.0}  # a guidance for each number of branches
MOST_STEPS = 1000  # of a velocity model, which has no training timesteps


def open_pipeline(
    bundle: Bundle,
    engine: str = "auto",
    threads: int = 0,
    size: tuple[int, int] | None = None,
    precision: str | None = None,
) -> Pipeline:
    """A pipeline for a server, as ``Pipeline`` opens it.

    OpenVINO compiles its graphs for any batch: images join and leave all the time, and it takes a second and more to
    compile a graph for each batch.

    Raises:
        BundleError, EngineError, ParityError: as ``Pipeline``.
    """
    pipe = Pipeline(bundle, ANY_BATCH if engine == "openvino" else engine, threads, size, precision)
    if engine != AUTO or pipe.engine.info.library != "openvino":
        return pipe
    chosen = str(pipe.engine.info.precision)
    pipe.engine.close()
    return Pipeline(pipe.bundle, choose_engine(pipe.bundle, threads, ANY_BATCH, chosen).engine)


def warm_up(pipe: Pipeline, batch_size: int) -> list[tuple[int, int]]:
    """Load the graphs, and prepare the engine for batches of 1 to ``batch_size`` images, with guidance and without.

    An engine that ``auto`` chose is verified at them. The largest batch is the first, so that memory does not move.

    Returns:
        (images, branches) of the steps that were run.

    Raises:
        EngineError: the engine cannot run such a batch.
        ParityError: an engine that ``auto`` chose does not match the reference at such a batch.
    """
    info = pipe.engine.info
    model, diffusion = pipe.manifest.model, pipe.manifest.diffusion
    guided = is_guidable(model, diffusion)
    branches = [count for count in GUIDANCE if info.has_branches(count)] if guided else [1]
    sizes = range(batch_size, 0, -1) if info.prepares_shapes else (batch_size,)
    ran = []
    with Batch(pipe.engine, pipe.manifest) as batch:
        if info.loop_on_device:
            _fill_table(pipe, batch, batch_size, max(branches))
        for size in sizes:
            for count in reversed(branches):
                pipe.trust((size, count))
                images = pipe.prepare([0] * size, steps=1, guidance=GUIDANCE[count])
                batch.add(list(enumerate(images)))
                latents = batch.advance(read=True).latents.copy()
                batch.remove(range(size))
                ran.append((size, count))
            for _ in range(1 + info.prepares_shapes):  # TensorRT captures a decoder at its second call
                pipe.decode(latents)
    return ran


def _fill_table(pipe: Pipeline, batch: Batch, size: int, branches: int) -> None:
    """Let the conditioning table have as much memory as it ever may: where it moves, CUDA graphs are captured again."""
    manifest = pipe.manifest
    steps = len(manifest.diffusion.betas) or MOST_STEPS
    labels = [index % manifest.model.classes for index in range(size)]
    sampler, *_ = samplers_for(manifest.diffusion)
    images = pipe.prepare(labels, steps=steps, sampler=sampler, guidance=GUIDANCE[branches])
    pipe.trust((size, branches))
    batch.add(list(enumerate(images)))
    batch.advance()
    batch.remove(range(size))
