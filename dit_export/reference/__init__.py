"""The PyTorch references, and the golden records and measurements that they leave in a bundle."""
