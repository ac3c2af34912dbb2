"""Images that clients send: what is decoded, what is refused before it costs anything, and what is never asked."""

import asyncio
import base64
import io
import re
import resource
import shutil
import socket
import ssl
import subprocess
import time
from contextlib import asynccontextmanager, nullcontext, suppress
from ipaddress import ip_network

import numpy as np
import pytest
from PIL import Image

from blip2.data.images import read_image
from blip2.errors import InputError
from blip2.serve import images as module
from blip2.serve.fetch import BadImageError, Fetcher, is_allowed
from blip2.serve.images import ImageReader
from fixtures.bad_images import SVG, bombs, data_url, encode, large_png

LOOPBACK = ("127.0.0.1/32",)


def read(url, reader=None, **options):
    return asyncio.run((reader or ImageReader(**options)).read(url))


def refused(url, reader=None, **options):
    """The message for a client."""
    with pytest.raises(BadImageError) as raised:
        read(url, reader, **options)
    text = str(raised.value)
    assert "\n" not in text and len(text) < 300 and not re.search(r"0x|/home|/tmp|\.py|Traceback|Errno", text), text
    return text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_an_image_is_decoded_as_a_pipeline_would_decode_its_file(kind):
    data = encode(kind)
    image = read(data_url(data, kind.lower()))
    assert image.mode == "RGB" and image.size == (40, 30)
    assert (np.asarray(image) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()
    assert asyncio.run(ImageReader().read(data_url(data, kind.lower()), lambda image: image.size)) == (40, 30)


def test_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    for kind in ("GIF", "WEBP", "PNG"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:] * 50, lossless=True)
        assert read(data_url(file.getvalue(), kind.lower())).getpixel((4, 4)) in ((255, 0, 0), (254, 0, 0))


@pytest.mark.parametrize(
    "header",
    [
        "data:image/PNG;base64,",
        "DATA:image/png;BASE64,",
        "data:image/png;charset=utf-8;base64,",
        "data:image/x;base64,",
    ],
)
def test_headers_of_data_urls(header):
    url = header + data_url(encode()).partition(",")[2]
    if "/x" in header:
        assert "media type of an image is 'image/x'" in refused(url)
    else:
        assert read(url).size == (40, 30)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "expected a data URL"),
        ("cat.png", "expected a data URL"),
        ("/etc/passwd", "expected a data URL"),
        ("../../etc/passwd", "expected a data URL"),
        ("file:///etc/passwd", "expected a data URL"),
        ("ftp://example.com/a.png", "expected a data URL"),
        ("\x1b[2J\ud800", "expected a data URL"),
        ("data:", "expected a data URL in base64"),
        ("data:image/png;base64" + ";a" * 300, "expected a data URL in base64"),
        ("data:image/png,%89PNG", "expected a data URL in base64"),
        ("data:;base64,AAAA", "expected a data URL in base64"),
        ("data:text/html;base64,AAAA", "media type"),
        ("data:image/svg+xml;base64," + base64.b64encode(SVG).decode(), "media type"),
        (data_url(SVG), "SVG and documents are not read"),
        (data_url(b""), "are not a JPEG"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "are not a JPEG"),
        (data_url(encode("TIFF")), "are not a JPEG"),
        (data_url(encode("BMP")), "are not a JPEG"),
        (data_url(encode("JPEG")), "sent as image/png, but is image/jpeg"),
        (data_url(encode(), "webp"), "sent as image/webp, but is image/png"),
        (data_url(encode())[:-1], "base64 of an image is damaged"),
        (data_url(encode()) + "=", "base64 of an image is damaged"),
        (data_url(encode()) + "\n", "base64 of an image is damaged"),
        (data_url(encode()).replace("A", "-", 1), "base64 of an image is damaged"),
        (data_url(encode()).replace("A", "\uff21", 1), "base64 of an image is damaged"),
        ("http://127.0.0.1/", "does not fetch images by URL"),
        ("HTTPS://example.com/a.png", "does not fetch images by URL"),
    ],
)
def test_what_is_not_an_image_is_refused(url, reason):
    assert reason in refused(url)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_and_damaged_files_are_refused(kind):
    data = encode(kind)
    for length in (12, 40, len(data) // 2, len(data) - 30):
        assert "are not a JPEG" in (text := refused(data_url(data[:length], kind.lower()))) or "truncated" in text
    rng = np.random.default_rng(0)
    for _ in range(60):  # a flipped bit may still be an image, but never another error
        damaged = bytearray(data)
        damaged[rng.integers(12, len(data))] ^= 1 << int(rng.integers(8))
        with suppress(BadImageError):
            read(data_url(bytes(damaged), kind.lower()))


def test_the_size_in_bytes_is_checked_before_the_base64():
    data = encode()
    assert read(data_url(data), max_bytes=len(data)).size == (40, 30)
    assert "bytes, expected at most" in refused(data_url(data), max_bytes=len(data) - 1)
    assert "bytes, expected at most 1,000" in refused("data:image/png;base64," + "!" * 10_000, max_bytes=1000)


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_bombs_are_refused_before_they_are_decoded():
    before, start = peak_memory(), time.process_time()
    for url in bombs().values():
        refused(url)
    assert peak_memory() - before < 200  # MB; the largest would be 10 GB
    assert time.process_time() - start < 20
    assert "has 9000 x 9000 pixels, expected at most 50,000,000" in refused(data_url(large_png()))


def test_a_jpeg_of_many_scans_is_refused():
    data = encode("JPEG", (400, 300), progressive=True)
    assert read(data_url(data, "jpeg"), max_pixels=150_000).size == (400, 300)
    scan = data.rindex(module.START_OF_SCAN)
    many = data[:-2] + data[scan:-2] * 500 + data[-2:]
    assert "scans: save it without progressive" in refused(data_url(many, "jpeg"), max_pixels=150_000)


# -- image URLs ----------------------------------------------------------------------------------------------------


SPECIAL = """
127.0.0.1 127.8.8.8 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.0.1 192.0.2.1 192.88.99.1
198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 :: ::1 ::ffff:127.0.0.1
::ffff:8.8.8.8 ::8.8.8.8 64:ff9b::7f00:1 64:ff9b::8.8.8.8 64:ff9b:1::1 100::1 fc00::1 fd12::1 fe80::1 fe80::1%eth0
fec0::1 ff02::1 2001::1 2001:db8::1 2002:7f00:1::1 3fff::1 5f00::1 4000::1 2130706433 0177.0.0.1 0x7f000001 127.1
localhost 168.63.129.16 192.0.0.9 2606:4700::1%eth0
"""
OTHER_NAMES = """
127.0.0.2 169.254.169.254 [::1] [::ffff:127.0.0.1] 2130706433 0x7f000001 0177.0.0.1 127.1 localhost 0 [::]
127.0.0.1.nip.io 127.0.0.1@127.0.0.2 127.0.0.1%2f@127.0.0.2 127.0.0.1%00.example.com 127\u30020\u30020\u30022
\u246b\u2466.0.0.2
"""


@pytest.mark.parametrize("address", SPECIAL.split())
def test_an_address_of_a_local_or_special_network_is_not_allowed(address):
    assert not is_allowed(address)


def test_public_addresses_and_networks_that_are_given_are_allowed():
    assert is_allowed("8.8.8.8") and is_allowed("2606:4700:4700::1111") and is_allowed("172.32.0.1")
    assert is_allowed("10.1.2.3", [ip_network("10.0.0.0/8")]) and not is_allowed(
        "10.1.2.3", [ip_network("10.0.0.0/16")]
    )


@pytest.mark.parametrize(
    "host", ["", "a b", "https://example.com", "example.com/path", "me@example.com", "a:99999", "a:0", "#"]
)
def test_a_host_that_is_none_is_an_error_of_the_operator(host):
    with pytest.raises(InputError, match=r"is invalid, expected one like example\.com"):
        ImageReader(hosts=[host])


def test_a_network_that_is_none_is_an_error_of_the_operator():
    with pytest.raises(InputError, match=r"'10\.0\.0\.1/8' is not a network .* expected one such as"):
        ImageReader(hosts=["example.com"], networks=["10.0.0.1/8"])


@pytest.mark.parametrize(("host", "ports"), [("example.com", [80, 443]), ("example.com:80", [80]), ("a.b:443", [443])])
def test_a_host_with_a_port_is_asked_at_this_port_alone(host, ports):
    name, fetcher = host.partition(":")[0], Fetcher([host], (), 100, 1.0)
    for port, urls in {80: ("http://{}/", "http://{}:80/"), 443: ("https://{}./", "https://{}:443/")}.items():
        for url in urls:
            with nullcontext() if port in ports else pytest.raises(BadImageError, match="a host that is not allowed"):
                fetcher._check(url.format(name))


def test_rotated_gray_and_transparent_images_are_read_as_in_a_file():
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    exif = Image.Exif()
    exif[0x0112] = 6
    for image, options in (
        (palette, {"transparency": 1}),
        (Image.new("LA", (4, 2), (9, 100)), {}),
        (Image.new("I;16", (4, 2), 40_000), {}),
        (Image.new("RGB", (4, 2), "red"), {"exif": exif}),
    ):
        file = io.BytesIO()
        image.save(file, "PNG", **options)
        found, expected = read(data_url(file.getvalue())), read_image(file.getvalue())
        assert found.mode == "RGB" and found.size == ((2, 4) if "exif" in options else (4, 2))
        assert found.tobytes() == expected.tobytes()


WITHOUT_END = {
    "drip": (b"HTTP/1.1 200 OK\r\n\r\n", b"x", 0.01),
    "drip headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.01),
    "endless": (b"HTTP/1.1 200 OK\r\n\r\n", bytes(1 << 16), 0),
}
"""The start of each response without an end, the part that repeats, and the seconds between two parts."""


class Web:
    """A web server of this machine that remembers what it was asked."""

    def __init__(self, address="127.0.0.1", tls=None):
        self.address, self.tls, self.asked, self.pages = address, tls, [], {}

    @asynccontextmanager
    async def run(self):
        server = await asyncio.start_server(self.answer, self.address, ssl=self.tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    def url(self, path, host=None):
        return f"http{'s' if self.tls else ''}://{host or self.address}:{self.port}{path}"

    def put(self, path, body=b"", status=200, **headers):
        fields = {"Content-Length": str(len(body)), **{name.replace("_", "-"): text for name, text in headers.items()}}
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {text}" for name, text in fields.items() if text is not None)]
        self.pages[path] = "\r\n".join(lines).encode() + b"\r\n\r\n" + body

    async def answer(self, reader, writer):
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(request)
        page = self.pages[request.split()[1]]
        try:
            if page == "silence":
                await asyncio.sleep(60)
            if page in WITHOUT_END:
                page, part, seconds = WITHOUT_END[page]
                writer.write(page)
                while True:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(seconds)
            writer.write(page)
            await writer.drain()
            writer.write_eof()
        except (ConnectionError, NotImplementedError):
            pass
        finally:
            writer.close()


def fetch(web, path, networks=LOOPBACK, hosts=(), others=(), url=None, **options):
    """The image of a path of a server that is allowed, or its error. The address of the server is allowed."""

    async def work():
        async with web.run():
            for other in others:
                other.port = web.port
            allowed = [f"{host}:{web.port}" for host in (web.address, *hosts)]
            reader = ImageReader(hosts=allowed, networks=networks, **options)
            return await reader.read(url(web) if url else web.url(path))

    return asyncio.run(work())


def not_fetched(*args, **options):
    with pytest.raises(BadImageError) as raised:
        fetch(*args, **options)
    text = str(raised.value)
    assert "\n" not in text and not re.search(r"127\.|0x|Errno|refused by|\.py", text), text
    return text


@pytest.fixture
def web():
    web = Web()
    web.put("/a.png", encode())
    return web


def test_an_image_of_an_allowed_host_is_fetched(web):
    assert fetch(web, "/a.png").size == (40, 30)
    (request,) = web.asked
    assert f"Host: 127.0.0.1:{web.port}" in request and "Accept-Encoding: identity" in request
    assert "Cookie" not in request and "Authorization" not in request


def test_the_address_is_checked_even_of_an_allowed_host(web):
    assert "cannot be fetched" in not_fetched(web, "/a.png", networks=())
    assert "cannot be fetched" in not_fetched(web, "/a.png", networks=("10.0.0.0/8",))
    assert web.asked == []


@pytest.mark.parametrize("host", OTHER_NAMES.split())
def test_other_names_of_this_machine_are_not_asked(web, host):
    text = not_fetched(web, "", url=lambda web: web.url("/a.png", host))
    reasons = ("host that is not allowed", "not a URL", "a user name or a password")
    assert any(reason in text for reason in reasons), text
    assert web.asked == []


def test_another_port_of_an_allowed_host_is_not_asked(web):
    assert "host that is not allowed" in not_fetched(web, "", url=lambda web: f"http://127.0.0.1:{web.port + 1}/a.png")
    assert "host that is not allowed" in not_fetched(web, "", url=lambda _: "http://127.0.0.1/a.png")


def test_redirects_are_followed_and_checked(web):
    web.put("/1", status=302, Location="/2")
    web.put("/2", status=307, Location="a.png")
    assert fetch(web, "/1").size == (40, 30)
    for number in range(5):
        web.put(f"/loop{number}", status=301, Location=f"/loop{number + 1}")
    assert "more than 3 redirects" in not_fetched(web, "/loop0")
    assert sum("/loop" in request for request in web.asked) == 4


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.2/secret",
        "http://169.254.169.254/latest/meta-data",
        "//[::1]/",
        "http://2130706433/",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "http://user:password@127.0.0.1/",
        "http://127.0.0.1:1/",
        "http://[",
        "x" * 5000,
        "",
    ],
)
def test_a_redirect_elsewhere_is_not_followed(web, target):
    web.put("/1", status=302, Location=target)
    assert "redirect" in not_fetched(web, "/1")
    assert len(web.asked) == (1 if target else 4)  # the empty one leads to itself


def name_server(monkeypatch, *answers):
    """Let names that end in .test resolve to these addresses: a list for each time."""
    resolve, times = socket.getaddrinfo, []

    def getaddrinfo(host, port, *args, **options):
        if not host.endswith(b".test" if isinstance(host, bytes) else ".test"):
            return resolve(host, port, *args, **options)
        times.append(host)
        addresses = answers[min(len(times), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return times


def test_a_name_that_is_bound_anew_reaches_only_the_address_that_was_checked(web, monkeypatch):
    times = name_server(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    image = fetch(web, "", hosts=["images.test"], url=lambda web: web.url("/a.png", "images.test"))
    assert image.size == (40, 30) and len(times) == 1
    assert f"Host: images.test:{web.port}" in web.asked[0]


@pytest.mark.parametrize("answer", [["127.0.0.2"], ["127.0.0.1", "127.0.0.2"], ["169.254.169.254"], []])
def test_a_name_with_an_address_that_is_not_allowed_is_not_asked(web, monkeypatch, answer):
    name_server(monkeypatch, answer)
    text = not_fetched(web, "", hosts=["images.test"], url=lambda web: web.url("/a.png", "images.test"))
    assert "cannot be fetched" in text and web.asked == []


def test_a_redirect_is_resolved_and_checked_anew(web, monkeypatch):
    times = name_server(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    web.put("/1", status=302, Location="/a.png")
    assert "cannot be fetched" in not_fetched(
        web, "", hosts=["images.test"], url=lambda web: web.url("/1", "images.test")
    )
    assert len(times) == 2 and len(web.asked) == 1


def test_what_a_host_may_answer(web):
    web.put("/404", status=404)
    assert "answered 404" in not_fetched(web, "/404")
    web.put("/text", b"root:x:0:0:secret")
    text = not_fetched(web, "/text")
    assert "are not a JPEG" in text and "secret" not in text
    web.put("/gzip", encode(), Content_Encoding="gzip")
    assert "compressed body" in not_fetched(web, "/gzip")
    web.put("/short", encode(), Content_Length="100000")
    assert "cannot be fetched" in not_fetched(web, "/short")
    web.put("/declared", encode(), Content_Length=str(10**9))
    assert "more than the 20,971,520 bytes" in not_fetched(web, "/declared")
    web.put("/odd", encode(), Content_Length="-5")
    assert "cannot be fetched" in not_fetched(web, "/odd")
    web.put("/chunked", b"zzz\r\n", Content_Length=None, Transfer_Encoding="chunked")
    assert "cannot be fetched" in not_fetched(web, "/chunked")
    web.put("/headers", Big="x" * 1_000_000)
    assert "cannot be fetched" in not_fetched(web, "/headers")
    web.pages["/nothing"] = b""
    assert "cannot be fetched" in not_fetched(web, "/nothing")
    web.pages["/endless"] = "endless"
    assert "more than the 1,000,000 bytes" in not_fetched(web, "/endless", max_bytes=1_000_000)


@pytest.mark.parametrize("page", ["drip", "drip headers", "silence"])
def test_a_slow_host_is_left(web, page):
    web.pages["/slow"] = page
    assert "not fetched within 0.2 seconds" in not_fetched(web, "/slow", fetch_seconds=0.2)


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with openssl")
def test_the_certificate_is_that_of_the_name(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=images.test"]
    command += ["-addext", "subjectAltName=DNS:images.test", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    name_server(monkeypatch, ["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    names = []
    context.sni_callback = lambda _, name, __: names.append(name)
    web = Web(tls=context)
    web.put("/a.png", encode())
    for host in ("images.test", "other.test"):

        def call(host=host):
            return fetch(web, "", hosts=[host], url=lambda web: web.url("/a.png", host))

        if host == "images.test":
            assert call().size == (40, 30)
        else:
            with pytest.raises(BadImageError, match="cannot be fetched"):
                call()
    assert names == ["images.test", "other.test"] and len(web.asked) == 1
