"""Triton kernels, each with its plain-torch reference; ``backend`` chooses between the two.

``sparse_decode`` is the attention of decode steps that read some rows of the cache, ``sinkhorn``
entropic optimal transport for many small problems.
"""
