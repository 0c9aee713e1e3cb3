"""Make failing cases as small as they can be and still fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from dit_runtime.verify.soak_cases import SoakCase, SoakImage

Cases = tuple[SoakCase, ...]

FEW_REPEATS = 8  # which are taken away one by one; many are halved


def shrink(cases: Cases, fails: Callable[[Cases], bool], simplest: str) -> Cases:
    """The smallest cases that were found to fail, from cases that fail.

    Each simpler variant that fails takes the place of the cases, until none of its own variants fails.

    Args:
        cases: that fail one after the other on a new engine.
        fails: whether cases fail. It may say no for another reason, such as the time.
        simplest: the simplest sampler of the model.
    """
    tried = {cases}
    while True:
        for simpler in _simpler_cases(cases, simplest):
            if simpler in tried:
                continue
            tried.add(simpler)
            if fails(simpler):
                cases = simpler
                break
        else:
            return cases


def last_cases(cases: Sequence[SoakCase]) -> Iterator[Cases]:
    """The last case alone, then the last 2, 4, 8 … and at last all cases."""
    count = 1
    while count < len(cases):
        yield tuple(cases[-count:])
        count *= 2
    if cases:
        yield tuple(cases)


def _simpler_cases(cases: Cases, simplest: str) -> Iterator[Cases]:
    """Simpler variants, those that save the most first."""
    for index in range(len(cases) - 1):  # the last case is the one that fails
        yield cases[:index] + cases[index + 1 :]
    for index, case in enumerate(cases):
        for simpler in _simpler_case(case, simplest):
            yield (*cases[:index], simpler, *cases[index + 1 :])


def _simpler_case(case: SoakCase, simplest: str) -> Iterator[SoakCase]:
    images, plain = case.images, SoakImage(simplest)
    yield replace(case, images=(plain,) * len(images))
    yield replace(case, images=(plain,) * len(images), threads=1, repeats=1, releases=(), decoded=0)
    if len(images) > 1:
        half = len(images) // 2
        yield replace(case, images=images[:half])
        yield replace(case, images=images[half:])
        for index in range(len(images)):
            fewer = images[:index] + images[index + 1 :]
            yield replace(case, images=fewer)
            yield replace(case, images=fewer, batch=max(case.batch - 1, 1))  # as many wait for a place
    for threads in (1, 2):
        if threads < case.threads:
            yield replace(case, threads=threads)
    for index in range(len(case.releases)):
        yield replace(case, releases=case.releases[:index] + case.releases[index + 1 :])
    if case.decoded:
        yield replace(case, decoded=0)
        yield replace(case, decoded=1)
    for batch in (1, len(images), case.batch // 2, case.batch - 1):
        if 1 <= batch < case.batch:
            yield replace(case, batch=batch)
    if case.size is not None:
        yield replace(case, size=None)
    for change in _changes(images, simplest):  # in all images at once, and then in each
        yield replace(case, images=tuple(change(image) for image in images))
        for index, image in enumerate(images):
            yield replace(case, images=(*images[:index], change(image), *images[index + 1 :]))
    for repeats in (1, case.repeats // 2, *([case.repeats - 1] if case.repeats <= FEW_REPEATS else [])):
        if 1 <= repeats < case.repeats:
            yield replace(case, repeats=repeats)


def _changes(images: Sequence[SoakImage], simplest: str) -> list[Callable[[SoakImage], SoakImage]]:
    """What makes an image simpler; a change may leave an image as it is."""
    plain = SoakImage(simplest)
    names = ("strength", "negative_label", "guidance_interval", "guidance_schedule", "guidance", "spacing", "eta")
    found: list[Callable[[SoakImage], SoakImage]] = [
        lambda image: replace(image, sampler=simplest, eta=0.0, spacing=None),
        lambda image: replace(image, sampler=simplest),
        *(lambda image, name=name: replace(image, **{name: getattr(plain, name)}) for name in names),
        lambda image: replace(image, labels=((image.labels[0][0], 1.0),)),
        lambda image: replace(image, labels=image.labels[:2]),
        *(lambda image, steps=steps: replace(image, steps=min(steps, image.steps)) for steps in (1, 2)),
        lambda image: replace(image, steps=max(image.steps // 2, 1)),
        lambda image: replace(image, steps=max(image.steps - 1, 1)),
        lambda image: replace(image, guidance=2.0) if image.guidance not in (1.0, 2.0) else image,
        lambda image: replace(image, labels=((0, 1.0),)) if len(image.labels) == 1 else image,
        lambda image: replace(image, seed=0),
    ]
    return found
