"""What plain diffusers draws without this package: ``stranger.py [--trust] IMAGES FOLDER ...``.

The images go into the file IMAGES, by the folders' names; the classes of the denoisers and the
configurations of the pipelines to the standard output.
"""

import builders.without_compress  # noqa: F401, I001 - before anything else

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from builders.drawing import draw


def main(file: str, *folders: str, trust: bool) -> None:
    torch.set_num_threads(1)
    options = {"trust_remote_code": True} if trust else {}
    images, facts = {}, {}
    for folder in folders:
        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
        name = Path(folder).name
        images[name] = draw(pipeline)
        config = {key: value for key, value in pipeline.config.items() if key[0] != "_"}
        (part,) = {"unet", "transformer"} & {*pipeline.components}
        facts[name] = config | {part: type(getattr(pipeline, part)).__name__}
    np.savez(file, **images)
    print(json.dumps(facts))
    if any(name.split(".")[0] == "compress" for name in sys.modules):
        sys.exit("compress was imported")


if __name__ == "__main__":
    main(*(word for word in sys.argv[1:] if word != "--trust"), trust="--trust" in sys.argv)
