"""The methods that there are, by the names that recipes and checkpoints call them."""

from typing import Annotated

from pydantic import Field

from compress.fastocr import FastOCR
from compress.gradflow import GradFlow, OneShot
from compress.rtprune import RTPrune

WEIGHT_METHODS: dict[str, type] = {"gradflow": GradFlow, "oneshot": OneShot}
RUNTIME_METHODS: dict[str, type] = {"rtprune": RTPrune, "fastocr": FastOCR}
AnyWeightMethod = Annotated[GradFlow | OneShot, Field(discriminator="name")]
AnyRuntimeMethod = Annotated[RTPrune | FastOCR, Field(discriminator="name")]
