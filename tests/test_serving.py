"""A reader with a method behind transformers' server gives the text that it gives in Python."""

import base64
import io

import pytest
from starlette.testclient import TestClient

from compress import FastOCR, apply, load_reader
from compress.data.ocr_pages import load_pages
from compress.models.reading import read_pages
from compress.runs.serving import application


# the server opens images by torchvision
@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
def test_a_served_page_is_read_as_in_python(tmp_path):
    model, processor, _ = load_reader("builtin:reader-qwen")
    page, text = load_pages("builtin:pages", 1, unseen_font=False).pages[0].open(), "Read it."
    checkpoint = str(tmp_path / "checkpoint")
    with apply(
        model,
        FastOCR(keep_visual=0.02, min_visual=0, min_fixation=0, dense_layers="none"),
        processor=processor,
    ) as applied:
        applied.save(checkpoint)
        [expected] = read_pages(model, processor, [page], text, max_new_tokens=40)
    [dense] = read_pages(model, processor, [page], text, max_new_tokens=40)
    assert dense.text != expected.text

    file = io.BytesIO()
    page.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": text},
    ]
    asked = {
        "model": checkpoint,
        "max_tokens": 40,
        "temperature": 0,
        "messages": [{"role": "user", "content": content}],
    }
    with TestClient(application(checkpoint, device="cpu")) as client:
        answer = client.post("/v1/chat/completions", json=asked)
        for other in (f"{checkpoint}/", "builtin:reader-qwen"):
            refused = client.post("/v1/chat/completions", json=asked | {"model": other})
            assert refused.status_code == 400 and "pinned" in refused.text
        for route in ("/load_model", "/reset"):
            assert client.post(route, json={"model": checkpoint}).status_code == 404
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == expected.text
    assert answer.json()["usage"]["completion_tokens"] == expected.new_tokens


def test_a_processor_without_a_chat_template_is_refused():
    with pytest.raises(ValueError, match="builtin:reader-deepseek has none; serve another family"):
        application("builtin:reader-deepseek")
