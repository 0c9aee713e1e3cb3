"""Images in a batch: labels, starts, the loop over their steps, and tiles."""
