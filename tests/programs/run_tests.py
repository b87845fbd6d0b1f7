"""Tests of the current folder: ``run_tests.py ...``, with arguments of pytest."""

import sys

import pytest

if __name__ == "__main__":
    # pytest's plugins are imported already, with their assertions as they stand
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "--assert=plain"]
    if code := pytest.main([*options, *sys.argv[1:]]):
        sys.exit(code)
