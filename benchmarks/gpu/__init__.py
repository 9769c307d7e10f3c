"""What only a GPU can tell: whether the kernels are right there, and how fast they are.

`make gpu` runs it all on a machine with nothing but Python, torch and Triton.

| file       | what is in it                                                                 |
|------------|-------------------------------------------------------------------------------|
| `compare`  | the rule that every result is held to                                         |
| `inputs`   | arguments for the operations, and the same mathematics as a textbook has it   |
| `capture`  | a function as a CUDA graph                                                    |
| `checks`   | each operation against float64, opcheck, torch.compile and graph capture      |
| `loop`     | a whole sampling loop, captured and timed                                     |
| `timing`   | achieved bandwidth of each operation beside the device's own copies           |
| `sections` | what is run, a process for each operation                                     |
| `report`   | the machine, JSON and Markdown                                                |

Every check takes a device, so that the tests run them on a CPU, in Triton's interpreter.
"""
