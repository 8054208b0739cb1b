"""A real HTTP server on this machine that breaks, hangs, errs and lies as it is told, and shards for it to serve."""

from __future__ import annotations

import contextlib
import gc
import io
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from longskip.engine.data.pack import write_shards
from longskip.engine.data.remote import RemoteSource, open_remote
from longskip.engine.data.sources import ShardSource
from longskip.engine.data.transport import Patience

SAMPLES, PER_SHARD, WINDOW, SEED = 46, 5, 2, 9
QUICK = Patience(attempts=5, silence=5.0, total=20.0, pause=0.01, longest_pause=0.02)
GIB = 1 << 30
WEBDATASET = ["webdataset"] if shutil.which("curl") else []
TRANSPORTS = pytest.mark.parametrize("transport", ["fsspec", *WEBDATASET])


class Server:
    """Serves a folder. ``faults[file]`` is consumed one per GET; ``log`` has every GET's file and Range."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges = True
        self.faults: dict[str, list[tuple]] = {}
        self.log: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                file = unquote(urlsplit(self.path).path).removeprefix("/data/")
                asked = self.headers.get("Range")
                fault: tuple = ("fine",)
                if body:
                    server.log.append((file, asked))
                    server.headers.append(dict(self.headers))
                    fault = (server.faults.get(file) or [fault]).pop(0)
                path = server.folder / file
                if fault[0] == "status" or not path.is_file():
                    self.send_response(fault[1] if fault[0] == "status" else 404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data = path.read_bytes()
                if fault[0] == "wrong":
                    data = bytes(byte ^ 0x41 for byte in data[:600]) + data[600:]
                elif fault[0] == "instead":
                    data = fault[1]
                start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked and server.ranges else 0
                self.send_response(206 if asked and server.ranges else 200)
                if asked and server.ranges:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - start))
                self.send_header("ETag", '"an etag"')
                self.end_headers()
                if not body:
                    return
                with contextlib.suppress(OSError):
                    self.body(file, data[start:], fault)

            def body(self, file, data, fault):
                if fault[0] in ("break", "hang"):
                    self.wfile.write(data[: fault[1]])
                    self.wfile.flush()
                    server.sent[file] += fault[1]
                    server.released.wait(0.1 if fault[0] == "break" else 30)
                    self.close_connection = True
                elif fault[0] == "drip":
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        if server.released.wait(0.02):
                            return
                else:
                    self.wfile.write(data)
                    server.sent[file] += len(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/data"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def gets(self, file: str) -> list[str | None]:
        return [asked for name, asked in self.log if name == file]

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 21 + i % 3, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(out: Path) -> Path:
    """``SAMPLES`` pictures in shards of ``PER_SHARD``."""
    rows = ({"png": png(i), "txt": f"number {i}", "json": {"nr": i}} for i in range(SAMPLES))
    write_shards(rows, out, per_shard=PER_SHARD)
    return out


def forget_connections() -> None:
    """fsspec keeps file systems for ever; in a forked rank of a later test their end would wait for a thread that is
    not there."""
    import fsspec

    for scheme in ("http", "s3", "memory"):
        with contextlib.suppress(ImportError):
            fsspec.get_filesystem_class(scheme).clear_instance_cache()
    gc.collect()


@contextlib.contextmanager
def opening(server: Server, cache: Path) -> Iterator[Callable[..., RemoteSource]]:
    """``open_remote`` on the server with a cache of the test's own; closes what it opened."""
    sources = []

    def open_(url: str | None = None, **options) -> RemoteSource:
        options = {"transport": "fsspec", "cache": cache, "patience": QUICK} | options
        source = open_remote(url or server.url, **({"window_shards": WINDOW, "seed": SEED} | options))
        sources.append(source)
        return source

    yield open_
    for source in sources:
        source.close()


def everything(source: ShardSource, stop: int | None = None) -> list[tuple]:
    """All there is to read of the first ``stop`` samples, sample by sample."""
    return [
        (source.key(i), tuple(source.read(i)), source.size(i), source.captions(i), source.member(i, "json"),
         source.member(i, "latent.npy"))
        for i in range(stop or len(source))
    ]  # fmt: skip
