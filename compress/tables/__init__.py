"""The comparison tables that maintainers run; ``compress tables``."""
