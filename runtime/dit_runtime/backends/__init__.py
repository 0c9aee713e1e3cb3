"""What loads and runs a bundle's graphs: one contract, and a folder for each backend."""
