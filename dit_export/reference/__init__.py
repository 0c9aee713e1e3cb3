"""PyTorch references, and what they record in a bundle."""
