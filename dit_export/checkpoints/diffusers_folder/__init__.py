"""Reads diffusers ``DiTPipeline`` folders: a transformer, an autoencoder, and a scheduler as a forward process."""
