"""The packages of the wheel: those below compress/, and the three folders that lie beside it."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["compress", "compress.*"]),
        "compress.eval",
        "compress.kernels",
        "compress.recipes",
    ]
)
