"""FastOCR: each decode step attends to the visual tokens on which the eye rests now."""

from compress.methods.fastocr.calibration import Calibration, calibrate
from compress.methods.fastocr.method import FastOCR
from compress.methods.fastocr.preflight import preflight

__all__ = ["Calibration", "FastOCR", "calibrate", "preflight"]
