"""Files to copy into other programs: each writes a trace without this package.

pyengine_trace.h          C99 and C++, a header alone
pyengine_trace.rs         Rust, std alone
pyengine_trace_torch.py   PyTorch, by forward hooks
pyengine_cb_eval.h        llama.cpp and its forks: a `cb_eval`, beside pyengine_trace.h

`pyengine dumper c` (rust, torch, llama.cpp) prints one.  The layout is that of `oracle/trace.py`.
"""

from __future__ import annotations

from pathlib import Path

DUMPERS = {
    "c": "pyengine_trace.h",
    "rust": "pyengine_trace.rs",
    "torch": "pyengine_trace_torch.py",
    "llama.cpp": "pyengine_cb_eval.h",
}


def dumper(language: str) -> str:
    """The text of one of DUMPERS."""
    return Path(__file__).with_name(DUMPERS[language]).read_text(encoding="utf-8")
