"""Faults of engines at inputs that no golden record has, each with the rung that names its kind."""

from __future__ import annotations

import engine_mistakes as made
import numpy as np
from fault import PASSES, Fault

from dit_runtime.bundle.manifest import ENCODER

ENGINE_FAULTS = (
    Fault(
        "one class reads its neighbour's row", "classes and timesteps", "label 5", {"conditioner": made.use_neighbour}
    ),
    Fault("timesteps are whole numbers", "classes and timesteps", "timestep", {"conditioner": made.whole_timesteps}),
    Fault(
        "the conditioner is wrong after row 64",
        "conditioner calls",
        "of a call of",
        outputs={"conditioner": made.spoil_rows_from(64)},
    ),
    Fault(
        "wrong at batch 2 only", "batch invariance", "at batch 2", outputs={"step": made.step_at(lambda n, _: n == 2)}
    ),
    Fault(
        "wrong at batch 3 only", "batch invariance", "at batch 3", outputs={"step": made.step_at(lambda n, _: n == 3)}
    ),
    Fault("wrong from batch 5", "batch invariance", "at batch 5", outputs={"step": made.step_at(lambda n, _: n >= 5)}),
    Fault(
        "the last image of three",
        "batch invariance",
        "image 3 at batch 3",
        outputs={"step": made.at_batch(lambda n: n == 3, 2)},
    ),
    Fault(
        "wrong at batch 7 only",
        "batch invariance",
        "at batch 7",
        outputs={"step": made.step_at(lambda n, _: n == 7)},
        quick=False,
    ),
    Fault(
        "wrong with guidance at batch 2",
        "batch invariance, guided",
        "at batch 2",
        outputs={"step": made.step_at(lambda n, g: (n, g) == (2, 2))},
    ),
    Fault("rows above 32 wrap", "rows of the table", "rows", {"step": made.wrap_rows(32)}),
    Fault("rows above 128 wrap", "rows of the table", "rows", {"step": made.wrap_rows(128)}),
    Fault("rows above 4096 wrap", "rows of the table", "rows", {"step": made.wrap_rows(4096)}),
    Fault("rows above 65536 wrap", "rows of the table", "rows", {"step": made.wrap_rows(65536)}, quick=False),
    Fault("the third branch is ignored", "branches", "G=3", {"step": made.drop_third_branch}),
    Fault("branches without weight count", "branches", "", {"step": made.fall_back_in_sum}),
    Fault(
        "guidance of the first image for all",
        "guidance of each image",
        "image 2",
        {"step": made.use_first_of("guidance", 1)},
    ),
    Fault(
        "guidance of the first channel for all",
        "guidance of each image",
        "",
        {"step": made.use_first_of("guidance", 2)},
    ),
    Fault(
        "coefficients of the first image for all",
        "sampler of each image",
        "image 2",
        {"step": made.use_first_of("coefficients", 0)},
    ),
    Fault("variance of later images is ignored", "batch invariance", "variance", {"step": made.forget_variance}),
    Fault("slot 2 is stale from batch 2", "sampler of each image", "slot 2", outputs={"step": made.keep_slot}),
    Fault(
        "noise where its scale is 0",
        "sampler of each image",
        "slot 0, noise of scale 0",
        outputs={"step": made.add_noise},
    ),
    Fault("a later call is another's", "repeated call", "later", remembering=made.leak, quick=False),
    Fault(
        "the decoder is wrong at batch 2 only",
        "decoder batches",
        "at batch 2",
        outputs={"decoder": made.at_batch(lambda n: n == 2)},
    ),
    Fault("images are flipped at batch 1", "uint8 batches", "at batch 1", outputs={"decoder": made.flip_images}),
    # The same kind, not of the audit.
    Fault(
        "class 0 reads class 1",
        "classes and timesteps",
        "label 0",
        made.change_inputs("conditioner", "labels", lambda labels: np.where(labels == 0, 1, labels)),
    ),
    Fault(
        "the last class reads the one before it",
        "classes and timesteps",
        "label 9",
        made.change_inputs("conditioner", "labels", lambda labels: np.where(labels == 9, 8, labels)),
    ),
    Fault(
        "timestep 0 is 1",
        "classes and timesteps",
        "timestep 0",
        made.change_inputs("conditioner", "timesteps", lambda times: np.where(times == 0, 1, times)),
    ),
    Fault(
        "the last row of an odd call is the one before it",
        "conditioner calls",
        "",
        outputs={"conditioner": made.repeat_row_before},
    ),
    Fault("a second call at batch 3 is stale", "batch invariance", "at batch 3", remembering=made.stay_stale),
    Fault(
        "the image that fills a batch up leaks", "batch invariance", "at batch 3", outputs={"step": made.leak_padding}
    ),
    Fault(
        "wrong from batch 9",
        "batch invariance",
        "at batch 9",
        outputs={"step": made.step_at(lambda n, _: n >= 9)},
        quick=False,
    ),
    Fault(
        "all images read the first one's row of the null class",
        "batch invariance, guided",
        "at batch 2",
        {"step": made.share_null},
    ),
    Fault(
        "rows that are multiples of 64 are the first row",
        "rows of the table",
        "rows",
        made.change_inputs("step", "rows", made.repeat_row),
    ),
    Fault(
        "the third branch is wrong at batch 2 only",
        "branches",
        "at batch 2, G=3",
        outputs={"step": made.step_at(lambda n, g: (n, g) == (2, 3))},
    ),
    Fault(
        "wrong with four branches", "branches", "G=4", outputs={"step": made.step_at(lambda _, g: g == 4)}, quick=False
    ),
    Fault(
        "a third branch's negative weight is ignored",
        "branches",
        "",
        made.change_inputs("step", "guidance", made.drop_negative_of_third),
    ),
    Fault("noise of the first image for all", "sampler of each image", "slot 0", {"step": made.reuse_noise}),
    Fault("noise of the call before", "batch invariance, guided", "variance", remembering=made.keep_noise),
    Fault("the last image draws no noise", "batch invariance", "variance", {"step": made.silence_last}),
    Fault(
        "slots 1 and 2 exchanged from batch 3",
        "sampler of each image",
        "slot 1",
        outputs={"step": made.swap_slots_from_three},
    ),
    *(
        Fault(name, "mixed batch", "after row", patches=made.in_loop(*change))
        for name, change in made.LOOP_FAULTS.items()
    ),
    Fault(
        "the decoder is wrong at odd batches from 3",
        "decoder batches",
        "at batch 3",
        outputs={"decoder": made.at_batch(lambda n: n >= 3 and n % 2 == 1)},
    ),
    Fault(
        "later images are a level brighter", "uint8 batches", "image 2 at batch 2", outputs={"decoder": made.move_level}
    ),
    Fault(
        "the encoder is wrong at batch 2",
        "encoder batches",
        "at batch 2",
        outputs={ENCODER: made.at_batch(lambda n: n == 2)},
        graph=ENCODER,
    ),
    Fault(
        "the encoder's deviation is the first image's",
        "encoder batches",
        "std of image 2",
        outputs={ENCODER: made.share_deviation},
        graph=ENCODER,
    ),
    *(
        Fault(name, rung, where, outputs={"step": change}, quick=False)
        for name, (rung, where, change) in made.SHAPE_FAULTS.items()
    ),
    Fault(
        "row 1000 of the table is the first row",
        "rows of the table",
        "rows",
        made.change_inputs("step", "rows", lambda rows: np.where(rows == 1000, 0, rows)),
        quick=False,
    ),
    Fault(
        "rows 700 and 701 of the table are exchanged",
        "rows of the table",
        "rows",
        made.change_inputs("step", "rows", lambda rows: np.where((rows == 700) | (rows == 701), 1401 - rows, rows)),
        quick=False,
    ),
    Fault(
        "the decoder is wrong at batch 11 only",
        "decoder batches",
        "at batch 11",
        outputs={"decoder": made.at_batch(lambda n: n == 11)},
        quick=False,
    ),
    # Those that pass.
    Fault(
        "wrong at batches 18 to 22 only",
        PASSES,
        outputs={"step": made.step_at(lambda n, _: 18 <= n <= 22)},
        quick=False,
        why="batches above 16 are sampled; the report names those that no call has",
    ),
    Fault(
        "row 3000 of the table is the first row",
        PASSES,
        inputs=made.change_inputs("step", "rows", lambda rows: np.where(rows == 3000, 0, rows)),
        quick=False,
        why="rows above 2048 are sampled; the report says how many of how many are read",
    ),
)
