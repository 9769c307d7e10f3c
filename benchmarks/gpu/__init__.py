"""How fast the operations are on this machine's GPU: `python -m benchmarks.gpu`, or `make gpu`.

`make gpu` first runs `tests/kernels` there, which say whether they are right. This needs Python,
torch and Triton, and nothing of this repository installed.

| file       | what is in it                                                               |
|------------|-----------------------------------------------------------------------------|
| `textbook` | the same mathematics as written in a codebase without custom kernels        |
| `timing`   | achieved bandwidth of each operation beside the device's own copies         |
| `loop`     | whole sampling loops, eager, captured and compiled                          |
| `report`   | the machine, and the results as they come and as a page                     |

Everything takes a device and a clock, so that tests run it on a CPU.
"""
