"""Block-wise quantisation of vectors that travel or rest in few bits. Knows tensors only."""
