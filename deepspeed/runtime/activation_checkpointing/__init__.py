"""Activation checkpointing: recompute activations in backward instead of keeping them."""
