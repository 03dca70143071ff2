"""Numeric flags: settings of torch, and of the CPU, under which the last bits of a result may be others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["compare_flags", "numeric_flags"]

_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")


def numeric_flags() -> dict[str, Any]:
    """Each flag by a readable name; plain values. Nothing is changed, and no device is waited for."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "oneDNN": bool(torch.backends.mkldnn.enabled),
        "default dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "float32 matmul precision": _readable(torch.get_float32_matmul_precision),
        "TF32 in matmul": _readable(lambda: cuda.matmul.allow_tf32),
        "TF32 in cuDNN": _readable(lambda: cudnn.allow_tf32),
        "fp16 reduced precision reduction": cuda.matmul.allow_fp16_reduced_precision_reduction,
        "bf16 reduced precision reduction": cuda.matmul.allow_bf16_reduced_precision_reduction,
        "attention kernels": [k for k in _ATTENTION if getattr(cuda, f"{k}_sdp_enabled")()],
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic algorithms warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn.enabled": cudnn.enabled,
        "cudnn.benchmark": cudnn.benchmark,
        "cudnn.deterministic": cudnn.deterministic,
        "flush denormals": bool((torch.tensor(1e-40) * 1.0 == 0).item()),
    }


def _readable(read: Any) -> Any:
    """The flag, or `mixed` where torch's newer interface set it, so that the older one refuses to read it."""
    try:
        return read()
    except RuntimeError:
        return f"mixed ({_per_backend()})"


def _per_backend() -> str:
    backends = torch.backends
    parts = {
        "cuda matmul": backends.cuda.matmul,
        "cudnn conv": getattr(backends.cudnn, "conv", None),
        "cudnn rnn": getattr(backends.cudnn, "rnn", None),
        "mkldnn matmul": getattr(backends.mkldnn, "matmul", None),
    }
    found = {name: getattr(part, "fp32_precision", None) for name, part in parts.items()}
    return ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)


def compare_flags(saved: Mapping[str, Any]) -> list[str]:
    """Which flags differ from `saved`, each with both values; empty if none does."""
    now = numeric_flags()
    return [
        f"{name}: it was {value!r}, now it is {now[name]!r}"
        for name, value in saved.items()
        if name in now and now[name] != value
    ]
