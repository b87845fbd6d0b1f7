"""FastOCR: a decode step attends to the few visual tokens that a focal layer chose."""

from compress.methods.fastocr.method import FastOCR

__all__ = ["FastOCR"]
