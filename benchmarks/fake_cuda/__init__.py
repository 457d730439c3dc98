"""A CUDA device of fake tensors: runs the engine's CUDA branches on a machine that has no GPU.

`library` compiles and loads the C++ part, which has to happen before torch is imported; `device` is the
device. Both change the process for good, so what uses them runs in a process of its own. Nothing is computed:
a tensor on the device has a shape, a dtype and no values, and each value that the host reads is one that a
caller chose.
"""
