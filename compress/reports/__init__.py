"""Reports of finished runs: HTML, figures, comparisons."""
