"""A service in a thread of the test's process."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from PIL import Image

from xomni_jax.core.http import listen
from xomni_jax.pipeline import XOmni
from xomni_jax.sampling.logits import SamplingConfig
from xomni_jax.serving.app import Site, create_app
from xomni_jax.serving.options import ServeOptions
from xomni_jax.serving.server import App
from xomni_jax.serving.service import ServedModel, Service

SMALL = dict(slots=4, segment=2, max_prompt_tokens=64, max_answer_tokens=16, max_queue=16, max_images=8)


@contextmanager
def listening(site: Site) -> Iterator[str]:
    """The URL of a service that is ready."""
    ready, failures = threading.Event(), []
    app = create_app(site, ready.set, lambda error: (failures.append(error), ready.set()))
    listener = listen("127.0.0.1", 0, "")
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        assert ready.wait(600) and not failures, failures
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


@contextmanager
def served(models: dict[str, XOmni], rewards: dict | None = None, **options: object) -> Iterator[tuple[App, str]]:
    """(state, URL) of a service of these models that is ready."""
    o = ServeOptions(**SMALL | options)
    state = App(Service({n: ServedModel(n, m, o) for n, m in models.items()}, o), rewards or {}, SamplingConfig(), True, None)
    with listening(state) as url:
        yield state, url


def image_of(b64: str) -> Image.Image:
    """The image of a base64 field."""
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def uri_of(image: Image.Image) -> str:
    """An image as data: URI."""
    file = io.BytesIO()
    image.save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
