"""Counts of what a step launches, moves and computes, traced on tensors without memory.

| module       | what is in it                                            |
|--------------|----------------------------------------------------------|
| `launches`   | how many kernels torch's operations launch on CUDA       |
| `trace`      | the mode that counts                                     |
| `passes`     | to which pass of a step an operation belongs             |
| `steps`      | the steps that are traced: this engine's and a textbook's |
"""
