"""GroupNorm with affine, per-sample scale and shift, and SiLU, as one operation.

| module                | what is in it                                                  |
|-----------------------|----------------------------------------------------------------|
| `op`                  | the mathematics, the reference, and the registered operations  |
| `plan`                | how a tensor is divided among programs                         |
| `forward`, `backward` | the Triton functions; `parts` is what both use                 |
| `launch`              | their launches                                                 |
"""
