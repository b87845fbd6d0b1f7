"""The methods that there are, by the names that recipes and checkpoints call them."""

from typing import Annotated

from pydantic import Field

from compress.methods.fastocr import FastOCR
from compress.methods.gradflow import GradFlow, OneShot
from compress.methods.rtprune import RTPrune

WEIGHT_METHODS: dict[str, type] = {"gradflow": GradFlow, "oneshot": OneShot}
RUNTIME_METHODS: dict[str, type] = {"rtprune": RTPrune, "fastocr": FastOCR}
AnyWeightMethod = Annotated[GradFlow | OneShot, Field(discriminator="name")]
AnyRuntimeMethod = Annotated[RTPrune | FastOCR, Field(discriminator="name")]
