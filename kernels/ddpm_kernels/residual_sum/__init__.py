"""The sum that ends a residual branch, and the moments of what it writes, in one pass.

| module   | what is in it                                                  |
|----------|----------------------------------------------------------------|
| `op`     | the mathematics, the reference, and the registered operation   |
| `launch` | the Triton function, and its launch                            |
"""
