"""Images, deterministic batches, pages to read, and where they come from."""
