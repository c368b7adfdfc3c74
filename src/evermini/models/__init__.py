"""Weights: catalogue, download, checkpoints, and the decoder that computes with them."""
