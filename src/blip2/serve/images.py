"""Decode the images that clients send, within limits.

A client sends an image as a data URL, or, if the server allows the host, as the URL of a file (:mod:`.fetch`). Its size
in bytes is checked before its base64 is decoded, and its format and its number of pixels before its pixels are.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import anyio
from anyio import to_thread
from PIL import Image

from blip2.data.images import START_OF_SCAN, ImageError, open_image, read_image
from blip2.serve.fetch import BadImageError, Fetcher

T = TypeVar("T")

MAX_IMAGE_BYTES = 20 << 20
"""Maximum size of an image file in bytes."""
MAX_IMAGE_PIXELS = 50_000_000
"""Maximum number of pixels of an image."""
MAX_SCANS = 10
"""Maximum number of scans of a JPEG with the maximum number of pixels; a smaller one may have more. Decoding takes time
for every scan, and a small file can have thousands."""
DECODERS = 2
"""Maximum number of images that are decoded at the same time: each takes up to 16 bytes a pixel."""
FETCH_SECONDS = 5.0
"""Maximum duration of fetching an image by its URL, in seconds."""

MAX_HEADER = 400
"""Maximum number of characters of a data URL before its base64."""
HEADER = re.compile(r"data:([^;,]{1,80})((?:;[^;,]{1,80})*?)(;base64)?,", re.IGNORECASE)
MEDIA_TYPES = {"jpeg": "jpeg", "jpg": "jpeg", "pjpeg": "jpeg", "png": "png", "webp": "webp", "gif": "gif"}
FORMATS = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
"""Pillow's names of the formats that are decoded. MPO is a JPEG with more images behind the first."""
EXPECTED = "a JPEG, PNG, WebP or GIF image"
EXAMPLE = "data:image/png;base64,..."


class ImageReader:
    """Reads the images of requests.

    Args:
        max_bytes: maximum size of an image file in bytes.
        max_pixels: maximum number of pixels of an image.
        hosts: hosts from which images are fetched, as ``host`` or ``host:port``. None by default: only data URLs are
            read.
        networks: networks such as ``10.0.0.0/8`` in which these hosts may be, besides the public Internet.
        fetch_seconds: maximum duration of a fetch in seconds.

    Raises:
        InputError: a host or a network is invalid.
    """

    def __init__(
        self,
        max_bytes: int = MAX_IMAGE_BYTES,
        max_pixels: int = MAX_IMAGE_PIXELS,
        hosts: Iterable[str] = (),
        networks: Iterable[str] = (),
        fetch_seconds: float = FETCH_SECONDS,
    ) -> None:
        self._max_bytes, self._max_pixels = max_bytes, max_pixels
        self._fetcher = Fetcher(hosts, networks, max_bytes, fetch_seconds)
        self._decoders = anyio.CapacityLimiter(DECODERS)

    async def read(self, url: str, convert: Callable[[Image.Image], T] | None = None) -> Any:
        """Return the image of a URL.

        Args:
            url: a data URL, or the URL of a file on an allowed host.
            convert: called with the image in the thread that decoded it. While a request waits, only the result is
                kept, which is much smaller than the pixels of a photo if `convert` resizes them.

        Returns:
            The result of `convert`, or a PIL image in mode RGB.

        Raises:
            BadImageError: the image cannot be read, or is larger than allowed.
        """

        def work() -> Any:
            image = self.decode(data, media_type)
            return image if convert is None else convert(image)

        media_type: str | None = None
        if url[:5].lower() == "data:":
            data, media_type = self.parse_data_url(url)
        elif url[:8].lower().startswith(("http://", "https://")):
            data = await self._fetcher.fetch(url)
        else:
            raise BadImageError(f"an image is {url[:40]!r}, expected a data URL: send {EXAMPLE}")
        return await to_thread.run_sync(work, limiter=self._decoders)

    def parse_data_url(self, url: str) -> tuple[bytes, str]:
        """Return the bytes in a data URL, and their format according to its media type.

        Raises:
            BadImageError: it is not a data URL of an image in base64, or has more bytes than allowed.
        """
        header = HEADER.match(url, 0, MAX_HEADER)
        if header is None or header[3] is None:
            raise BadImageError(f"an image is {url[:40]!r}, expected a data URL in base64: send {EXAMPLE}")
        main, _, name = header[1].strip().lower().partition("/")
        if main != "image" or name not in MEDIA_TYPES:
            raise BadImageError(
                f"the media type of an image is {header[1][:40]!r}, expected that of {EXPECTED}: convert it"
            )
        size = (len(url) - header.end()) // 4 * 3
        if size > self._max_bytes + 2:  # as much may be padding
            raise self._too_large(size)
        try:
            data = binascii.a2b_base64(url[header.end() :].encode("ascii"), strict_mode=True)
        except (binascii.Error, UnicodeEncodeError) as error:
            raise BadImageError(
                f"the base64 of an image is damaged: send {EXAMPLE} in the standard alphabet"
            ) from error
        if len(data) > self._max_bytes:
            raise self._too_large(len(data))
        return data, MEDIA_TYPES[name]

    def decode(self, data: bytes, media_type: str | None = None) -> Image.Image:
        """Decode the bytes of an image file to 8-bit RGB; of an animation, the first frame.

        Args:
            data: the bytes of a JPEG, PNG, WebP or GIF file.
            media_type: the format that the client named: jpeg, png, webp or gif. None: it named none.

        Raises:
            BadImageError: the bytes are not such an image, or not one of the format named, are damaged or truncated, or
                have more pixels than allowed.
        """
        found = detect_format(data)
        if found is None:
            raise BadImageError(
                f"the bytes of an image are not {EXPECTED}: convert it (SVG and documents are not read)"
            )
        if media_type is not None and media_type != found:
            raise BadImageError(f"an image is sent as image/{media_type}, but is image/{found}: send image/{found}")
        try:
            with open_image(data, "image", show_bytes=False) as opened:  # reads the header alone
                kind = FORMATS.get(opened.format or "")
                problem = self._find_problem(kind, opened.width, opened.height, data.count(START_OF_SCAN))
                if problem is None:
                    return read_image(opened)
        except ImageError as error:
            raise BadImageError(
                f"an image is damaged, truncated or over {self._max_pixels:,} pixels: send a complete or smaller one"
            ) from error
        raise BadImageError(problem)  # not above, where it would become an ImageError

    def _find_problem(self, kind: str | None, width: int, height: int, scans: int) -> str | None:
        """Return the error message for the header of an image; None if the header is valid."""
        if kind is None:
            return f"the bytes of an image are not {EXPECTED}: convert it"
        if width * height > self._max_pixels:
            return f"an image has {width} x {height} pixels, expected at most {self._max_pixels:,}: make it smaller"
        if kind == "jpeg" and scans * width * height > MAX_SCANS * self._max_pixels:
            return f"a JPEG of {width} x {height} pixels has {scans} scans: save it without progressive encoding"
        return None

    def _too_large(self, size: int) -> BadImageError:
        return BadImageError(f"an image has {size:,} bytes, expected at most {self._max_bytes:,}: make it smaller")


def detect_format(data: bytes) -> str | None:
    """Return the format of a file by its first bytes: jpeg, png, webp or gif; None for any other."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    return "gif" if data.startswith((b"GIF87a", b"GIF89a")) else None
