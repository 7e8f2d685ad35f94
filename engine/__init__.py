"""Fine-tune LoRA adapters on GGUF llama models on a CPU, and predict with them.

=================================  ===============================================================
`Model`                            weights in the mapped file, hyperparameters, tokenizer
`Context`                          evaluates tokens with any number of adapters; owns the cache
`Adapter`, `read_adapter`          low-rank factors in memory and in each of their file forms
`Trainer`                          loss of a batch and the adapter's gradient
`Tokenizer`                        text to tokens and back, from a file's metadata
`isa()`, `isas()`                  the kernel variant in force, and all that this machine runs
`get_include()`                    folder of the C headers, for extensions that cimport the engine
=================================  ===============================================================

Names are loaded when first asked for, so importing the package costs nothing and works where no
kernel variant runs. Extensions cimport what ``__init__.pxd`` lists.
"""

from importlib import import_module
from pathlib import Path

# name: (module, name there)
_HOMES = {
    "Adapter": ("engine.lora", "Adapter"),
    "Context": ("engine.model", "Context"),
    "Model": ("engine.model", "Model"),
    "Tokenizer": ("engine.tokenizer", "Tokenizer"),
    "Trainer": ("engine.training.trainer", "Trainer"),
    "isa": ("engine.kernels", "active_isa"),
    "isas": ("engine.kernels", "isas"),
    "read_adapter": ("engine.lora", "read_adapter"),
}

__all__ = [
    "Adapter",
    "Context",
    "Model",
    "Tokenizer",
    "Trainer",
    "get_include",
    "isa",
    "isas",
    "read_adapter",
]


def get_include() -> str:
    """Folder of the C headers that an extension needs which cimports the engine."""
    return str(Path(__file__).parent / "simd")


def __getattr__(name: str) -> object:
    """Load a public name when it is first asked for (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("cylora")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, own_name = _HOMES[name]
    value = getattr(import_module(module), own_name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names of the package, those not loaded yet among them."""
    return sorted({*globals(), *_HOMES, "__version__"})
