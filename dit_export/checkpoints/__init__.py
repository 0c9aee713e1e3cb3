"""Reads checkpoints: folders, files, hub ids and presets become one description of a model and its weights.

``sources.load_checkpoint`` is the entry. Each format of checkpoint is one module or folder (``diffusers_folder``,
``official_file``, ``random_preset``) with a ``FORMAT``, and one line in the table ``sources.FORMATS``.
"""
