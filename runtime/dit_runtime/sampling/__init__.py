"""Sampling: labels, the image to start from, the loop over a batch's steps, and decoding in tiles."""
