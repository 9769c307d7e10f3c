"""The figures of the diffusion process: one look, one module for each subject.

| module        | what it draws                                                            |
|---------------|--------------------------------------------------------------------------|
| `style`       | colours, sizes, writing: what all figures share                          |
| `strips`      | labelled rows of pictures, still and moving                              |
| `chain`       | an image dissolving into noise, and one emerging from it                 |
| `between`     | pictures between two pictures, and an image denoised from halfway        |
| `curves`      | loss, noise schedules, quality against steps, terms of the bound         |
| `plane`       | the same process in two dimensions, where a whole distribution is seen   |
| `exhibit`     | all that can be drawn of a trained run, by name                          |
"""
