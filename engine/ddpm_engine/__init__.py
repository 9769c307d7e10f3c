"""A training and sampling engine for denoising diffusion models.

| to do this                      | look in                                             |
|---------------------------------|-----------------------------------------------------|
| the diffusion process           | `schedule`, `process`, `prediction`, `objectives`   |
| draw pictures                   | `samplers.sample`, `pretrained.load_model`     |
| the network                     | `unet.UNet`                                         |
| what enlarges small pictures    | `low_resolution`                                    |
| pack and read images            | `data`                                              |
| train                           | `config.RunConfig`, `training.Trainer`              |
| exchange models with others     | `interop`                                           |
| look at the result              | `evaluation`                                        |
"""
