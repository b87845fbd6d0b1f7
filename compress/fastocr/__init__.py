"""FastOCR: each decode step attends to the visual tokens on which the eye rests now."""

from compress.fastocr.calibration import Calibration, calibrate
from compress.fastocr.method import FastOCR
from compress.fastocr.preflight import preflight

__all__ = ["Calibration", "FastOCR", "calibrate", "preflight"]
