"""Fast kernels, each with its plain-torch reference.

``sparse_decode`` is FastOCR's attention, ``sinkhorn`` RTPrune's transport; ``backend`` chooses. The
per-patch Sobel filter of RTPrune's ``textual_density`` has no kernel: it was measured, and is too
small a part of reading a page (the figures stand beside it).
"""
