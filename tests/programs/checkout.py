"""Tests of the checkout in the current folder, with its own package: ``checkout.py SITE ...``.

What follows SITE, the folder where the package lies, goes to pytest.
"""

import sys

import pytest

if __name__ == "__main__":
    site, *arguments = sys.argv[1:]
    sys.path.insert(0, site)
    # pytest's plugins are imported already, with their assertions as they stand
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "--assert=plain"]
    if code := pytest.main([*options, *arguments]):
        sys.exit(code)
