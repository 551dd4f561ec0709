"""fastcm: train, run and ship consistency models."""

__version__ = "0.1.0"
__all__ = ["InputError", "RunError", "__version__", "load", "picture", "train"]

# torch takes a second to import: what needs it is imported when it is first asked for.
_EXPORTS = {
    "load": "fastcm.api",
    "picture": "fastcm.api",
    "train": "fastcm.runs",
    "InputError": "fastcm.errors",
    "RunError": "fastcm.errors",
}


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastcm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
