"""What a model is read from: folders, files and presets, their layouts and weights."""
