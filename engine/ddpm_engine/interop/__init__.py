"""Checkpoints of other libraries: read, checked value by value, and written.

| to do this                                            | look in                         |
|-------------------------------------------------------|---------------------------------|
| load the network that diffusers saved                 | `unet.UNet.from_pretrained`     |
| load it with its schedule, ready to draw              | `pretrained.load_pretrained`    |
| write what diffusers' `DDPMPipeline` loads            | `export.export_pipeline`        |
| load a network of guided- or improved-diffusion       | `guided.load_guided_unet`       |

None of these libraries is needed. A configuration is read entry by entry: what would change a
picture and cannot be honoured is refused by name, never ignored. Nothing that is read is executed:
safetensors, JSON, and pickles of which only the tensors are taken.
"""
