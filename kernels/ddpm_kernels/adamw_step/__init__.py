"""AdamW over flat buffers, with moving averages and half-precision weights, as one operation.

| module    | what is in it                                                                 |
|-----------|-------------------------------------------------------------------------------|
| `op`      | the mathematics, the references, and the registered operations                |
| `tables`  | how segments are divided among programs, and where gradients lie, on the device |
| `kernels` | the Triton functions                                                          |
| `launch`  | their launches                                                                |
"""
