"""Few-step tables: sampler tables fitted to a model's own fine trajectory, in numpy around the engine."""
