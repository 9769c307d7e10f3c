"""GroupNorm with affine, scale and shift, SiLU and dropout, of one map or two, as one operation.

| module                              | what is in it                                             |
|-------------------------------------|-----------------------------------------------------------|
| `op`                                | the function that networks call                           |
| `reference`                         | the mathematics, and its reference in torch               |
| `registered`                        | the registered operations and their gradients             |
| `plan`                              | how a tensor is divided among programs                    |
| `moments`, `forward`                | the Triton functions of the forward pass                  |
| `backward`, `backward_on_chip`      | those of the backward pass, and in `totals` the last      |
| `parts`, `backward_parts`           | what those of both passes, and of the second one, share   |
| `launch_forward`, `launch_backward` | the launches; `launching` is what both share              |
"""
