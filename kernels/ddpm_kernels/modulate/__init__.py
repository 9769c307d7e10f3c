"""Gated residual, LayerNorm or RMSNorm, per-sample scale and shift, as one operation.

| module    | what is in it                                                 |
|-----------|---------------------------------------------------------------|
| `op`      | the mathematics, the reference, and the registered operations |
| `kernels` | the Triton functions                                          |
| `launch`  | how tokens are divided among programs, and the launches       |
"""
