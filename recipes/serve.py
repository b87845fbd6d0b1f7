"""Serve a reader, with the methods of its checkpoint, by transformers' server (OpenAI's protocol).

pip install 'compress-models[serve]'
python -m compress.recipes.serve runs/reader_fastocr/checkpoint

Then post to http://localhost:8000/v1/chat/completions, with the checkpoint as "model" and the page
as an "image_url". One page is read at a time: run-time methods have no continuous batching.
"""

import sys
from typing import Any

from compress import load_reader
from compress.common.extras import extra

with extra("serve", "a server"):
    import uvicorn
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager, TimedModel
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState


def application(name: str, device: str | None = None) -> Any:
    """The server's ASGI application, which knows this one model.

    Raises
    ------
    ValueError : for a reader that has no chat template, which requests are turned into prompts by.
    """
    reader = load_reader(name, device=device)
    if not getattr(reader.processor, "chat_template", None):
        raise ValueError(
            f"a processor with a chat template expected; {name} has none; serve another family, or "
            "read pages by compress.load_reader in an application of your own"
        )
    manager, state = ModelManager(), GenerationState()
    manager.loaded_models[manager.process_model_name(name)] = TimedModel(
        reader.model, timeout_seconds=-1, processor=reader.processor
    )
    chat, completion, response, systemone = (
        handler(model_manager=manager, generation_state=state)
        for handler in (ChatCompletionHandler, CompletionHandler, ResponseHandler, SystemOneHandler)
    )
    others = completion, response, TranscriptionHandler(manager, state), systemone
    return build_server(manager, chat, *others, generation_state=state)


if __name__ == "__main__":
    uvicorn.run(application(*sys.argv[1:]), port=8000)
