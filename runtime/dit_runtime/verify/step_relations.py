"""Relations of the step: what every batch, place, branch, guidance, sampler and row of the table must give.

Each rung compares calls of the step with what follows from each image's result alone (``made_images.py``). The calls go
from shape to shape, because an engine may compile a graph for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dit_runtime.backends.base import Array
from dit_runtime.backends.conditioning import bytes_of_row
from dit_runtime.backends.profiles import BatchShape
from dit_runtime.samplers.schedule import NOISE, widen_rows
from dit_runtime.verify.effort import Effort, list_shapes
from dit_runtime.verify.made_images import MadeImages, Prediction
from dit_runtime.verify.relation import Relation
from dit_runtime.verify.replay import Replay
from dit_runtime.verify.rung import Rung
from dit_runtime.verify.updates import PARTS, add_update, draw_rows, expect_update, list_sampler_rows

SMALL = 3  # batches up to this one are called with all that is tried, and many times
MOST_EQUAL = 8  # images of a batch of equal images
MOST_READING = 8  # images of a batch that reads all rows of the table
SCALE = 1.5  # of guidance, where all images have the same


class StepRelations:
    """The relations of the step. ``visit`` makes the calls; ``rungs`` gives what they came to.

    Args:
        replay: the bundle and the engine.
        effort: how much is visited.
        shapes: the shapes to visit; None takes those of ``effort``.
    """

    def __init__(self, replay: Replay, effort: Effort, shapes: list[BatchShape] | None = None) -> None:
        self.replay, self.effort = replay, effort
        info, budget = replay.engine.info, replay.budget
        self.shapes = list_shapes(info, effort) if shapes is None else shapes
        self.made = MadeImages(replay, max(2, *(batch for batch, _ in self.shapes)))
        self.invariance = {
            1: Relation(budget, "batch invariance"),
            2: Relation(budget, "batch invariance, guided"),
        }
        self.rows = Relation(budget, "rows of the table")
        self.branches = Relation(budget, "branches")
        self.guidance = Relation(budget, "guidance of each image")
        self.sampler = Relation(budget, "sampler of each image")
        self.repeated = Relation(budget, "repeated call")
        self.sampled = list_sampler_rows(replay.bundle.manifest)
        guided = max((count for _, count in self.shapes if count <= 2), default=0)
        most = min(MOST_READING, effort.thorough)
        reading = [shape for shape in self.shapes if shape[1] == guided and shape[0] <= most]
        self.shape_of_rows = max(reading, default=None)
        self._first = self._predict_first()
        self._row = 0

    def visit(self) -> None:
        """Visit every shape, the rows of the table, and the first call again."""
        self._compare_with_first("at once")
        self._predict_all_alone()
        for batch, branches in self.shapes:
            if batch > self.effort.thorough:
                self._visit_once(batch, branches)
                continue
            if branches <= 2:
                self._visit_batch(batch, branches)
            if branches >= 2:
                self._visit_branches(batch, branches)
            self._visit_sampler(batch, branches)
            if (batch, branches) == self.shape_of_rows:
                self._visit_rows(batch, branches)
            if batch <= SMALL and branches <= 2:
                self._repeat(batch, branches)
        self._compare_with_first("later")

    def _predict_all_alone(self) -> None:
        """Predict all that is compared alone, in one go: an engine may compile a graph again for each shape."""
        for batch, branches in self.shapes:
            for image, conditions in enumerate(self._conditions(list(range(batch)), branches).T):
                for condition in conditions:
                    self.made.predict_alone(image, int(condition))

    def rungs(self) -> Iterator[Rung]:
        """The rungs, from the bottom up."""
        batches = {count: [batch for batch, most in self.shapes if most == count] for _, count in self.shapes}
        for branches, relation in self.invariance.items():
            if relation.compared:
                yield relation.rung(f"batches {' '.join(map(str, batches[branches]))}")
        if self.rows.compared:
            yield self.rows.rung(f"{self.rows_read} of {self.rows_taken} rows")
        if self.branches.compared:
            counts = " ".join(map(str, sorted(batches)))
            yield self.branches.rung(f"G {counts}, without weight and with")
        if self.guidance.compared:
            yield self.guidance.rung("scales of image, branch and channel differ")
        if self.sampler.compared:
            samplers = len(dict.fromkeys(name for name, _ in self.sampled))
            yield self.sampler.rung(f"all slots, noise of scale 0, rows of {samplers} samplers")
        yield self.repeated.rung(f"after {self.replay.visits.calls['step']} calls of the step")

    def _visit_batch(self, batch: int, branches: int) -> None:
        """Images beside others, in both orders, and the same image in every place."""
        own = list(range(batch))
        weights = np.full((branches, batch, self.channels), 1.0 if branches == 1 else SCALE)
        weights[1:] = 1 - SCALE
        orders = [own] if batch == 1 else [own, own[::-1]]
        if 1 < batch <= MOST_EQUAL:
            orders.append([batch // 2] * batch)
        for images in orders:
            conditions = np.array([images, [self.made.null(image) for image in images]][:branches])
            self._check(self.invariance[branches], images, conditions, weights)

    def _visit_branches(self, batch: int, branches: int) -> None:
        """Branches with and without weight, the same for all images; then weights of each image, branch and channel."""
        images = list(range(batch))
        conditions = self._conditions(images, branches)
        if batch <= SMALL or branches > 2:
            alone = np.zeros((branches, batch, self.channels))
            alone[0] = 1
            self._check(self.branches, images, conditions, alone)
            if branches > 2:
                # Every branch with weights of both signs, small and as large as strong guidance has.
                each = np.resize([1.3, -0.7, 0.9, -0.4, 0.6], branches)[:, None, None] * np.ones_like(alone)
                self._check(self.branches, images, conditions, each)
                self._check(self.branches, images, conditions, -6 * each)
        weights = self._vary_weights(conditions)
        self._check(self.guidance, images, conditions, weights)

    def _vary_weights(self, conditions: Array) -> Array:
        """Weights ``[G, B, C]`` of each image, branch and channel for conditions ``[G, B]``.

        Every second image has fewer branches; the others of its conditions are changed to any row.
        """
        branches, batch = conditions.shape
        random = np.random.default_rng(batch)
        weights: Array = (
            random.uniform(0.3, 1.5, (branches, batch, self.channels))
            * np.where((np.arange(branches)[:, None] + np.arange(batch)) % 2, -1, 1)[:, :, None]
        )
        for place in range(1, batch, 2):  # images with fewer branches read any row in the others
            weights[1 + place % branches :, place] = 0
            conditions[1 + place % branches :, place] = conditions[0, 0]
        return weights

    def _visit_once(self, batch: int, branches: int) -> None:
        """Few calls in which everything differs in each image, against what follows from each one's own results.

        Without guidance the output is compared by itself first, because its difference may be exactly 0.
        """
        images, made = list(range(batch)), self.made
        conditions = self._conditions(images, branches)
        if branches == 1:
            weights = np.ones((1, batch, self.channels))
            predicted = self._check(self.invariance[1], images, conditions, weights)
            rows = draw_rows(batch, predicted.v, batch % 2, self.replay.model.clips)
            self._check_update(images, conditions, weights, predicted, rows, [""] * batch)
            return
        weights = self._vary_weights(conditions)
        v = np.stack([made.predict_alone(image, int(conditions[0, image])).v for image in images])
        rows = draw_rows(batch, v, batch % 2, self.replay.model.clips)
        state, denoised = made.run(images, conditions, weights, rows, made.noise[images])
        for image in images:
            found = [*state[image], denoised[image]]
            e = made.expect(image, conditions[:, image], weights[:, image])
            where = f"of image {image + 1} at batch {batch}, G={branches}"
            add_update(self.guidance, found, made.state[image], e, v[image], rows[image], made.noise[image], where)

    def _conditions(self, images: Sequence[int], branches: int) -> Array:
        """The conditions ``[G, B]`` of images: their own, the null class, then those of the images after them."""
        made = self.made
        rows = [[made.own(image) for image in images], [made.null(image) for image in images]]
        rows += [[made.own((image + more) % made.count) for image in images] for more in range(1, branches - 1)]
        return np.array(rows[:branches])

    def _visit_sampler(self, batch: int, branches: int) -> None:
        """Every slot and coefficient, different in each image; every second image has noise of scale 0.

        Without guidance and in small batches either half of the images has no noise, and rows of samplers are tried.
        """
        images = list(range(batch))
        conditions, made = self._conditions(images, branches), self.made
        weights = np.full((branches, batch, self.channels), 1 / branches)
        predicted = made.predict(images, conditions, weights)
        more = branches == 1 or batch <= SMALL
        for silent in (0, 1)[: 1 + more]:
            rows = draw_rows(batch, predicted.v, silent, self.replay.model.clips)
            self._check_update(images, conditions, weights, predicted, rows, [""] * batch)
        if not more:
            return
        picked = [self.sampled[(self._row + place) % len(self.sampled)] for place in range(batch)]
        self._row += batch
        names, rows = (
            [f" with a row of {name}" for name, _ in picked],
            np.stack([widen_rows(row, self.replay.model.clips) for _, row in picked]),
        )
        self._check_update(images, conditions, weights, predicted, rows.astype(np.float32), names)

    def _check_update(
        self,
        images: list[int],
        conditions: Array,
        weights: Array,
        predicted: Prediction,
        rows: Array,
        names: Sequence[str],
    ) -> None:
        made = self.made
        found = made.run(images, conditions, weights, rows, made.noise[images])
        for place, image in enumerate(images):
            e, v = predicted.e[place], predicted.v[place]
            expected = expect_update(made.state[image], e, v, rows[place], made.noise[image])
            parts = [*found[0][place], found[1][place]]
            for part, one, wanted in zip(PARTS, parts, expected, strict=True):
                value = float(np.abs(one - wanted.value).max()) / max(wanted.scale, 1e-30)
                silent = ", noise of scale 0" if part == PARTS[0] and not rows[place, NOISE] else ""
                where = f"{part}{silent} of image {place + 1} at batch {len(images)}{names[place]}"
                self.sampler.add_exact("update", value if np.isfinite(value) else np.inf, where)

    def _visit_rows(self, batch: int, branches: int) -> None:
        """Rows of a table as long as an engine takes: the first ones, next to powers of two, at the end and between.

        All rows but those that a call reads are zero, so that a row which is read in another's place shows.
        """
        info, made, spec = self.replay.engine.info, self.made, self.replay.bundle.manifest.table
        most = max(batch * branches, self.effort.table_bytes // bytes_of_row(spec))
        if "step" in info.profiles:
            profiles = info.profiles["step"]
            most = min(most, max(profiles.values_at(batch, profiles.largest_sizes("rows")), default=1))
        batch = max(1, min(batch, most // branches))
        rows = list_rows(most, self.effort.rows, self.effort.first_rows)
        self.rows_taken, self.rows_read = most, len(rows)
        # Memory is taken only for the pages that are written.
        table = np.zeros((most, *made.table.shape[1:]), made.table.dtype)
        images = list(range(batch))
        weights = np.full((branches, batch, self.channels), 1.0 if branches == 1 else SCALE)
        weights[1:] = 1 - SCALE
        conditions = self._conditions(images, branches)
        for first in range(0, len(rows), conditions.size):
            first = max(0, min(first, len(rows) - conditions.size))
            group = np.random.default_rng(first).permutation(rows[first : first + conditions.size])
            read = group.reshape(conditions.shape)
            table[read] = made.table[conditions]
            self._check(self.rows, images, conditions, weights, read, table)
            table[read] = 0

    def _predict_first(self) -> Prediction:
        """The call that is made again after all others: two images without guidance, or one."""
        images = list(range(min(2, max(batch for batch, _ in self.shapes))))
        return self.made.predict(images, self._conditions(images, 1), np.ones((1, len(images), self.channels)))

    def _repeat(self, batch: int, branches: int) -> None:
        """Call the step many times."""
        images = list(range(batch))
        weights = np.full((branches, batch, self.channels), 1 / branches)
        for _ in range(self.effort.repeats):
            self.made.predict(images, self._conditions(images, branches), weights)

    def _compare_with_first(self, when: str) -> None:
        found, first = self._predict_first(), self._first
        for place in range(len(first.e)):
            for kind, record, one, other in (
                ("forward", "forward_1", found.e[place], first.e[place]),
                ("variance", "forward_1 variance", found.v[place], first.v[place]),
            ):
                scale, norm = float(np.abs(other).max(initial=0)), float(np.linalg.norm(other))
                self.repeated.add(kind, record, one, other, f"{kind} of image {place + 1}, {when}", scale, norm)

    def _check(
        self,
        relation: Relation,
        images: list[int],
        conditions: Array,
        weights: Array,
        rows: Array | None = None,
        table: Array | None = None,
    ) -> Prediction:
        """Predict, and compare each image with the sum of its branches' own results."""
        found = self.made.predict(images, conditions, weights, rows, table)
        for place, image in enumerate(images):
            expected = self.made.expect(image, conditions[:, place], weights[:, place])
            where = f"image {place + 1} at batch {len(images)}, G={len(conditions)}"
            if rows is not None:
                where = f"rows {' and '.join(map(str, rows[:, place]))} read by {where}"
            relation.add("forward", "forward_1", found.e[place], expected.value, where, expected.scale, expected.norm)
            if self.replay.model.learned_variance:
                v = self.made.predict_alone(image, int(conditions[0, place])).v
                scale, norm = float(np.abs(v).max()), float(np.linalg.norm(v))
                relation.add("variance", "forward_1 variance", found.v[place], v, f"{where}, variance", scale, norm)
        return found

    @property
    def channels(self) -> int:
        return self.replay.model.latent_channels


def list_rows(count: int, drawn: int, first: int = 0) -> Array:
    """The rows of a table to read, rising: the first ones, those next to powers of two, the last two, and drawn ones.

    Args:
        count: rows of the table.
        drawn: how many are drawn.
        first: how many of the first ones are read.
    """
    powers = 2 ** np.arange(32, dtype=np.int64)
    ends = [0, count - 2, count - 1]
    random = np.random.default_rng(0).integers(0, count, drawn)
    found = np.concatenate([np.arange(first), powers - 1, powers, powers + 1, ends, random])
    return np.unique(found[(found >= 0) & (found < count)])
