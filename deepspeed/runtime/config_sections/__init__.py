"""Typed models of the config sections whose features live in higher layers: data here, behaviour there."""
