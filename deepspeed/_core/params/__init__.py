"""Partitioned parameters (ZeRO-3): who holds them, when they are whole, and how they travel."""
