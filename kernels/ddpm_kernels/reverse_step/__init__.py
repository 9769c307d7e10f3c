"""One step of the reverse process for every sampler, as one operation.

| module    | what is in it                                                   |
|-----------|-----------------------------------------------------------------|
| `op`      | the mathematics, the reference, and the registered operation    |
| `columns` | what a row of coefficients holds                                |
| `launch`  | the Triton function and its launch                              |
"""
