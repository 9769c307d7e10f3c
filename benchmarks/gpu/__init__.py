"""What a GPU makes of the engine, on a rented card and in ten minutes: `make gpu`.

Independent items, the most valuable first: is it right, does it train, how fast is it and what
holds it back. Each runs in a process of its own with a limit of its own; what it finds is kept at
once, and what no longer fits the budget is named. The next call continues where this one stopped.

| file             | what is in it                                                               |
|------------------|-----------------------------------------------------------------------------|
| `registry`       | the items, in order, with their estimates                                   |
| `item`, `items`  | what they are, and what they do                                             |
| `schedule`       | which runs when                                                             |
| `processes`      | a process for each, and its end                                             |
| `results`        | the file that they append to                                                |
| `report`         | the page made of it                                                         |
| `machine`        | the facts without which a figure means nothing                              |
| `timing`         | clocks; achieved bandwidth of an operation beside the device's own copies   |
| `textbook`       | the same mathematics as written in a codebase without custom kernels        |
| `measured_run`   | the Trainer, timed, watched for waits, and profiled                         |
| `trace`          | what a profiler's trace says                                                |
| `networks`       | the networks that are measured, and what they compute                       |
| `bundle`         | all that a machine without a network needs: `make gpu-bundle`               |

`--dry` runs all of it on a CPU at tiny sizes.
"""
