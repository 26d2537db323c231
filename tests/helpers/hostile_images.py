"""Small files that are slow to decode, or that are no regular files."""

import io
import os
import re
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

_SOS, _EOI, _DHT = b"\xff\xda", b"\xff\xd9", b"\xff\xc4"


def progressive_jpeg(scans: int, side: int) -> bytes:
    """Return a progressive JPEG of `side` x `side` px that refines its coefficients `scans` times.

    A scan takes about 31 bytes at 4000 x 4000 px, and 12 ms.
    """
    file = io.BytesIO()
    image = Image.fromarray(np.full((side, side), 120, np.uint8))
    image.save(file, "JPEG", quality=20, progressive=True)
    data = file.getvalue()[: -len(_EOI)]
    frame, *parts = re.split(rb"(?=\xff[\xda\xc4])", data)
    tables = [part for part in parts if part.startswith(_DHT)]
    refinement = next(part for part in reversed(parts) if part.startswith(_SOS))
    return frame + b"".join(tables) + refinement * scans + _EOI


def jpeg_bomb(size: int = 60_000, side: int = 4_000) -> bytes:
    """Return a progressive JPEG of about `size` bytes with as many scans as fit."""
    one, two = (len(progressive_jpeg(scans, side)) for scans in (1, 2))
    return progressive_jpeg((size - one) // (two - one), side)


def png_bomb(side: int = 20_000) -> bytes:
    """Return a PNG of `side` x `side` px of one bit: 50 kB for 1.2 GB once decoded."""
    row = bytes(1 + -(-side // 8))
    deflate = zlib.compressobj(1)
    packed = b"".join(deflate.compress(row) for _ in range(side)) + deflate.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = b"".join(chunk(k, d) for k, d in ((b"IHDR", head), (b"IDAT", packed), (b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + chunks


def png_texts(count: int = 50, size: int = 7_900_000) -> bytes:
    """Return a small PNG followed by compressed texts: each 8 kB, or `size` bytes once inflated."""
    file = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(file, "PNG")
    text = chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(size), 9))
    return file.getvalue()[:-12] + text * count + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def animation(kind: str, frames: int = 50, side: int = 256) -> bytes:
    """Return an animated image, `kind` being GIF, WEBP, PNG or TIFF."""
    images = [Image.fromarray(np.full((side, side, 3), k, np.uint8)) for k in range(frames)]
    file = io.BytesIO()
    images[0].save(file, kind, save_all=True, append_images=images[1:])
    return file.getvalue()


def fifo(path: Path) -> Path:
    """Create a named pipe, which blocks whoever opens it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


def unix_socket(path: Path) -> Path:
    """Create the file of a socket."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return path
