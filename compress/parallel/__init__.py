"""Work that several processes share, through accelerate and torchrun."""
