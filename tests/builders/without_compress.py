"""Importing this makes `import compress` fail, whatever is installed."""

import sys


class Absent:
    """A finder before all others, which refuses this package."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "compress":
            raise ImportError(f"{name} is not here")


sys.meta_path.insert(0, Absent())
try:
    import compress  # noqa: F401
except ImportError:
    pass
else:
    sys.exit("compress should not be importable")
