# What an extension outside of the engine may cimport; all else is the engine's own to change.
#
#     from engine cimport Graph, Tensor, decode_row
#
# Compile with engine.get_include() among the include directories.

from engine.api cimport decode_row, encode_bf16, encode_f16, row_bytes
from engine.graph cimport Graph, Node
from engine.tensor cimport Tensor
