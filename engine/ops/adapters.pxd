from engine.kernels cimport lora_up_args
from engine.tensor cimport Tensor

cdef int require_up(Tensor base, tuple parts) except -1
cdef lora_up_args lora_up_of(Tensor base, Tensor y, float scale, tuple parts) except *
