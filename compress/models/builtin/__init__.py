"""Models that ship with compress, and the scripts that trained them."""
