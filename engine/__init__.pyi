from engine.kernels import active_isa as isa
from engine.kernels import isas as isas
from engine.lora import Adapter as Adapter
from engine.lora import read_adapter as read_adapter
from engine.model import Context as Context
from engine.model import Model as Model
from engine.tokenizer import Tokenizer as Tokenizer
from engine.training.trainer import Trainer as Trainer

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

__version__: str

def get_include() -> str: ...
