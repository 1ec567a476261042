"""Safetensors files of flat fp32 slices: written and hashed in one pass over memory, read in part."""
from __future__ import annotations

import json
import os
import struct
import threading
from pathlib import Path

import safetensors
import torch

from serpent_scale.checkpoint import manifest
from serpent_scale.errors import UserError

CHUNK = 1 << 24  # bytes; long enough that writing and hashing spend their time without the interpreter's lock
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8", torch.bfloat16: "BF16"}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> dict:
    """Write contiguous CPU tensors and sync the file; its manifest entry. Raises OSError.

    The library's own writer would make the file be read again for its hash; here one thread hashes what another writes.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    parts = [memoryview(struct.pack("<Q", len(text)) + text)]
    parts += [memoryview(t.detach().view(-1).view(torch.uint8).numpy()) for t in tensors.values() if t.numel()]
    chunks = [part[i : i + CHUNK] for part in parts for i in range(0, len(part), CHUNK)]
    by = manifest.algorithm()
    digest = manifest.ALGORITHMS[by]()
    hashing = threading.Thread(target=lambda: [digest.update(chunk) for chunk in chunks])
    hashing.start()
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            for chunk in chunks:
                while chunk:  # a disk that fills up takes a part first
                    chunk = chunk[os.write(file, chunk) :]
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # os.write does not name the file
    finally:
        hashing.join()
    return {"bytes": sum(map(len, parts)), by: digest.hexdigest()}


class Reader:
    """Elements of parameters from the files of a checkpoint, each opened when it is first asked."""

    def __init__(self, folder: Path, file_name, slices: dict[str, list[list[int]]]):
        """`slices`: parameter -> [rank that wrote, offset, length] each; `file_name(rank)` is that rank's file."""
        self.folder, self.file_name, self.slices, self._files = folder, file_name, slices, {}

    def read(self, kind: str, name: str, offset: int, length: int) -> torch.Tensor:
        """(length,) elements of `name`, flattened, from `offset`. Raises UserError when they are not all there."""
        found = torch.empty(length)
        missing = length
        for rank, begin, size in self.slices[name]:
            low, high = max(offset, begin), min(offset + length, begin + size)
            if low < high:
                found[low - offset : high - offset] = self._open(rank).get_slice(f"{kind}.{name}")[low - begin : high - begin]
                missing -= high - low
        if missing:
            raise UserError(f"{self.folder}: {missing} elements of {kind} {name} are not in it; {manifest.MEND}")
        return found

    def whole(self, name: str) -> torch.Tensor:
        """A tensor that rank 0 wrote whole."""
        return self._open(0).get_tensor(name)

    def _open(self, rank: int):
        if rank not in self._files:
            path = self.folder / self.file_name(rank)
            try:
                self._files[rank] = safetensors.safe_open(path, framework="pt")
            except (OSError, safetensors.SafetensorError):
                raise UserError(f"{path}: missing or not safetensors; {manifest.MEND}") from None
        return self._files[rank]
