"""Nothing stays on the CPU where the model is elsewhere, on an accelerator that is emulated."""

import json

import pytest

from builders import programs
from builders.tiers import few

WORK = (
    "refusals",
    "soft_pruning_and_resuming",
    "half_precision",
    "criteria",
    "a_transformer",
    "latents_and_captions",
    "a_run",
    "readers",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, request) -> dict[str, str]:
    items = [item for item in request.session.items if item.path == request.path]
    asked = [item.callspec.params["work"] for item in items]
    done = programs.run("devices", *asked, cwd=tmp_path_factory.mktemp("devices"))
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("work", few(WORK, *WORK[:2], *WORK[5:], "criteria"))
def test_all_of_it_lies_on_the_device(outcomes, work):
    assert not outcomes[work], outcomes[work]
