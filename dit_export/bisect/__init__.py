"""Finds which units of an FP16 bundle break its error budget, and which layers of an INT8 bundle cost most."""
