"""The figures of a batcher's load that a front shows to whoever watches it."""

from __future__ import annotations

# Each figure's name, what it says, and the field of ``Load``. A gauge goes up and down, a counter only up.
GAUGES = (
    ("dit_waiting_images", "Images in the queue", "waiting"),
    ("dit_running_images", "Images in the batch", "running"),
    ("dit_batch_size", "Most images in the batch", "batch_size"),
    ("dit_step_seconds", "Median time of the latest steps", "step_seconds"),
)
COUNTERS = (
    ("dit_steps", "Calls of the step", "steps"),
    ("dit_images", "Finished images", "images"),
    ("dit_failed_images", "Failed images", "failures"),
)
