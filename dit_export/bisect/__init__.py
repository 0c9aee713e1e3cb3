"""Finds which units and operations of an FP16 bundle break its error budget."""
