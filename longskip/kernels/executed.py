"""Where each backend has been executed so far, by hand and by date: what ``doctor`` and docs/kernels.md say. No torch.

An adapter that is not listed here was never executed by this project; ``auto`` takes none of those (it takes what was
measured on the device, and nothing was).
"""

from __future__ import annotations

# backend -> ((where, since), ...); the tests of every op run there.
EXECUTED: dict[str, tuple[tuple[str, str], ...]] = {
    "reference": (("CPU (x86-64), torch 2.13", "2026-11"),),
    "torch": (("CPU (x86-64), torch 2.13", "2026-11"),),
    "triton": (
        ("Triton 3.7.1's interpreter, float32 and float16", "2026-11"),
        ("compiled for sm_80, sm_90 and sm_100, not run there", "2026-11"),
    ),
    "flash_attn": (),
    "xformers": (),
}


def tested(backend: str) -> str:
    """Where the backend was executed, in words; "untested" where it never was."""
    return "; ".join(where for where, _ in EXECUTED.get(backend, ())) or "untested"
