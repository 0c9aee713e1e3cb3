"""Which operations break FP16."""
