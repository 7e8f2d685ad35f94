"""LoRA adapters in memory, and the files they are kept in.

An adapter adds to a weight W of n_out rows of n_in elements the product scale · Bᵀ · A, where A is
``(rank, n_in)`` and B ``(rank, n_out)``: both rank-major, so that the two thin products of a
forward pass read rows.

==================  ===========================================================================
`engine.lora...`
==================  ===========================================================================
``adapter``         `Adapter`, its names and order, initial values, the base model it fits
``bin_form``        the ``.bin`` file of June 2024
``gguf_form``       the GGUF file that llama.cpp loads since July 2024
``peft_form``       the folder of Hugging Face's PEFT
``safetensors``     the container of its tensors
``join``            several adapters stacked into one pair a tensor
``forms``           which form: by the content when reading, by the name when writing
==================  ===========================================================================

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from engine.lora.adapter import (
    KINDS,
    LAYER_KINDS,
    MODEL_KINDS,
    Adapter,
    AdapterShape,
    BaseInfo,
    FloatArray,
    LoraPair,
    check_fits,
    create_adapter,
    file_order,
    kind_of,
    layer_of,
    table_names,
    table_position,
)
from engine.lora.forms import form_of_path, read_adapter, refusals, write_adapter
from engine.lora.join import in_halves, join_adapters

__all__ = [
    "KINDS",
    "LAYER_KINDS",
    "MODEL_KINDS",
    "Adapter",
    "AdapterShape",
    "BaseInfo",
    "FloatArray",
    "LoraPair",
    "check_fits",
    "create_adapter",
    "file_order",
    "form_of_path",
    "in_halves",
    "join_adapters",
    "kind_of",
    "layer_of",
    "read_adapter",
    "refusals",
    "table_names",
    "table_position",
    "write_adapter",
]
