"""Serve a reader, with the methods of its checkpoint, by transformers' server."""

from typing import Any

from compress.checkpoints.load import load_reader
from compress.common.environment import choose_device
from compress.common.extras import extra


def application(model: str, device: str | None = None) -> Any:
    """The ASGI application of ``transformers serve`` for one model; it refuses to load another.

    It speaks OpenAI's protocol, and reads one page at a time: a model with run-time methods has no
    continuous batching. The routes that load and unload models are not there.

    Parameters
    ----------
    model : ``builtin:NAME``, a folder, a hub id, or a runtime checkpoint with its methods. Requests
        name it as it is named here.
    device : CUDA where there is any when None.

    Raises
    ------
    ValueError : for a reader without a chat template, which turns requests into prompts.
    MissingExtraError : without the packages of transformers' server.
    """
    with extra("serve", "a server"):
        import fastapi  # noqa: F401  transformers' modules can be imported without it
        from transformers.cli.serving.chat_completion import ChatCompletionHandler
        from transformers.cli.serving.completion import CompletionHandler
        from transformers.cli.serving.model_manager import ModelManager, TimedModel
        from transformers.cli.serving.response import ResponseHandler
        from transformers.cli.serving.server import build_server
        from transformers.cli.serving.systemone import SystemOneHandler
        from transformers.cli.serving.transcription import TranscriptionHandler
        from transformers.cli.serving.utils import GenerationState

    reader = load_reader(model, device=choose_device(device))
    if not getattr(reader.processor, "chat_template", None):
        raise ValueError(
            f"a processor with a chat template expected; that of {model} has none; serve another "
            "family, or read folders of pages with compress read"
        )
    manager, state = ModelManager(), GenerationState()
    manager.force_model = model
    manager.loaded_models[manager.process_model_name(model)] = TimedModel(
        reader.model, timeout_seconds=-1, processor=reader.processor
    )
    chat, completion, response, systemone = (
        handler(model_manager=manager, generation_state=state)
        for handler in (ChatCompletionHandler, CompletionHandler, ResponseHandler, SystemOneHandler)
    )
    others = completion, response, TranscriptionHandler(manager, state), systemone
    served = build_server(manager, chat, *others, generation_state=state)
    loading = ("/load_model", "/reset")
    served.router.routes[:] = [
        route for route in served.router.routes if getattr(route, "path", None) not in loading
    ]
    return served
