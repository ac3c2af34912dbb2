"""Options of the service. The command line is made from this module, so it does not import PyTorch or FastAPI."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blip2.config import bounded


@dataclass(frozen=True)
class ServeOptions:
    """Address, access and limits of the service."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all addresses of this machine."""
    port: int = bounded(8000, 0, 65535)
    """Port to listen on; 0 for a free one."""
    api_key_file: Path | None = None
    """File with the API keys of clients, one per line. null: everybody who reaches the port may use the service."""
    allowed_hosts: list[str] | tuple[str, ...] = ()
    """A name of this server that the Host header of requests may have, such as blip2.example.com or *.example.com.
    Repeat the option for several; * allows all. Without it, a server that listens on a loopback address, as by default,
    accepts localhost and loopback addresses, and any other server accepts all names."""
    max_queue: int = bounded(64, 1, 100_000)
    """Maximum number of requests that wait or are worked on. Others get status 429 with Retry-After."""
    max_batch_size: int = bounded(16, 1, 4096)
    """Maximum number of texts that are generated at the same time, and of images or pairs in a pass of the model."""
    deadline: float = bounded(60.0, 0.01, 86_400)
    """Maximum number of seconds from receiving a request to the end of its answer; slower requests fail (504)."""
    max_body_bytes: int = bounded(32 << 20, 1024, 1 << 30)
    """Maximum size of the body of a request in bytes."""
    max_images: int = bounded(16, 1, 4096)
    """Maximum number of images in a request."""
    max_image_bytes: int = bounded(20 << 20, 1, 1 << 30)
    """Maximum size of an image file in bytes."""
    max_image_pixels: int = bounded(50_000_000, 1, 1 << 30)
    """Maximum number of pixels of an image."""
    max_tokens: int = bounded(1024, 1, 1_000_000)
    """Maximum number of tokens that an answer may have."""
    vllm_url: str | None = None
    """URL of a vLLM server that runs the LLM of the stage-2 model, such as http://10.0.0.5:8000/v1 (docs/serving.md).
    null: the LLM runs in this process."""
    vllm_model: str | None = None
    """Name of the LLM in the vLLM server. null: the name of the LLM in the model's config."""
    allow_image_host: list[str] | tuple[str, ...] = ()
    """A host from which images may be fetched by their URL, such as example.com or example.com:8443. Repeat the option
    for several. Without it, images are accepted only as data URLs."""
    allow_image_network: list[str] | tuple[str, ...] = ()
    """A network such as 10.0.0.0/8 in which these hosts may be, besides the public Internet: for images in a store of
    your own. Repeat the option for several."""
