"""Fast kernels, each with its plain-torch reference."""
