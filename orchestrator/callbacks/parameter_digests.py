"""ParameterDigests: a digest of all weights in the journal, by which two runs are compared to the bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from orchestrator.callbacks.base import Callback
from orchestrator.callbacks.checks import check_whole
from orchestrator.snapshot.capture import unwrapped

__all__ = ["ParameterDigests", "digest_by_bytes", "digest_by_xor", "parameter_digest"]

_ROW = 1021  # words in a row, of which one word is kept
_ROWS = 1024  # rows at a time: 8 MB of memory beside the weights
_WORD = 8  # bytes
_DIGEST = 8  # bytes


class ParameterDigests(Callback):
    """Notes a digest of all parameters and buffers in the journal, for `interlock diff` and for you.

    It is the note of `end_batch` on the batches that are due, and of every `end_epoch`:
    `parameters xor64:1f2e3d4c5b6a7988`. Equal weights have equal digests, on any device; others differ, but
    for an accident of one in 2^64 or so. Batches that are not due cost a comparison of two numbers; the others
    a pass over the weights and, on a device, one wait for it.

    Args:
        every_batches: due is every so many batches, from the first on.
    """

    def __init__(self, every_batches: int = 100) -> None:
        check_whole("ParameterDigests: every_batches", every_batches, unit="batch")
        self.every_batches = every_batches

    def on_batch_end(self, batch: int, metrics: Mapping[str, float]) -> None:
        """A digest, if one is due."""
        # After `end_batch` rather than `step`: every batch passes it once, accumulated or empty ones too.
        if (self.trainer.batches - 1) % self.every_batches == 0:
            self._note()

    def on_epoch_end(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """A digest."""
        self._note()

    def _note(self) -> None:
        self.trainer.note(f"parameters {parameter_digest(unwrapped(self.trainer.model))}")


def parameter_digest(model: nn.Module) -> str:
    """'METHOD:DIGEST' of the names, types, shapes and bits of a module's parameters and buffers.

    The method is `xor64` where torch has `hash_tensor` (from 2.9 on), else `blake2`.
    """
    tensors = {name: value.detach() for name, value in chain(model.named_parameters(), model.named_buffers())}
    if hasattr(torch, "hash_tensor"):
        return f"xor64:{digest_by_xor(tensors)}"
    return f"blake2:{digest_by_bytes(tensors)}"


@torch.no_grad()
def digest_by_xor(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits over tensors that are reduced where they are, by `torch.hash_tensor`.

    `hash_tensor` is the xor of all elements: it does not see their order, and equal ones cancel in pairs (a
    weight of ones has the hash of one of zeros). So the bits are taken in rows of 64-bit words, each multiplied
    with an odd number of its place in the row, which loses nothing; the digest is BLAKE2 of the rows' hashes, 0.1 %
    of the weights, in their order and with the names of the tensors.
    """
    return _combined(tensors, {name: _reduced(_bytes_of(tensor)) for name, tensor in tensors.items()})


@torch.no_grad()
def digest_by_bytes(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of BLAKE2 over every bit of the tensors, copied from their devices."""
    return _combined(tensors, {name: _bytes_of(tensor) for name, tensor in tensors.items()})


def _bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's elements in logical order; without a copy where they lie so."""
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return dense.resolve_conj().reshape(-1).view(torch.uint8)


def _reduced(data: Tensor) -> Tensor:
    """A word of 8 bytes for each full row, and the bytes that fill none."""
    filled = data.numel() // (_ROW * _WORD) * (_ROW * _WORD)
    if not filled:
        return data
    aligned = data if data.storage_offset() % _WORD == 0 else data.clone()
    rows = aligned[:filled].view(torch.int64).view(-1, _ROW)
    odd = 2 * torch.arange(_ROW, device=data.device) + 1
    hashes = [torch.hash_tensor(some * odd, 1) for some in torch.split(rows, _ROWS)]
    return torch.cat([*(found.view(torch.uint8) for found in hashes), data[filled:]])


def _combined(tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> str:
    """BLAKE2 of each tensor's name, type, shape, and its bytes in `parts`."""
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for name, part in _on_host(parts):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(errors="surrogatepass"))
        digest.update(part.numpy().data)
    return digest.hexdigest()


def _on_host(parts: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """The same on the CPU, by one copy from each device."""
    by_device: dict[torch.device, list[str]] = {}
    for name, part in parts.items():
        by_device.setdefault(part.device, []).append(name)
    found: dict[str, Tensor] = {}
    for device, names in by_device.items():
        there = [parts[name] for name in names]
        if device.type != "cpu":
            there = list(torch.split(torch.cat(there).cpu(), [part.numel() for part in there]))
        found.update(zip(names, there, strict=True))
    return ((name, found[name]) for name in parts)
