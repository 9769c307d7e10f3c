"""The weighted squared error between a prediction and its target, as one operation.

| module   | what is in it                                                    |
|----------|------------------------------------------------------------------|
| `op`     | the mathematics, the references, and the registered operation    |
| `launch` | the Triton functions and their launches                          |
"""
