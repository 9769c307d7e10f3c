"""What training minimises: which noise a sample meets, and the loss that it then gives.

| module         | holds                                                                        |
|----------------|------------------------------------------------------------------------------|
| `objective`    | what the trainer asks of an objective                                        |
| `build`        | the one that a configuration asks for                                        |
| `denoising`    | the objectives of DDPM and what followed, on a chain of T timesteps          |
| `edm`          | the objective of EDM, at any noise level                                     |
| `distillation` | a student that takes one step for many of its teacher                        |
| `moments`      | a student whose pictures a teacher expects, as far as a critic can tell      |
| `weighting`    | the weight of each timestep's squared error: a table                         |
| `timesteps`    | how often each timestep is trained: a table                                  |
| `conditions`   | what all do alike: mirrored images, dropped labels, small images to enlarge  |
"""

from ddpm_engine.objectives.build import build_objective
from ddpm_engine.objectives.denoising import DenoisingObjective
from ddpm_engine.objectives.distillation import Teacher
from ddpm_engine.objectives.edm import EdmObjective
from ddpm_engine.objectives.objective import Objective

__all__ = [
    "DenoisingObjective",
    "EdmObjective",
    "Objective",
    "Teacher",
    "build_objective",
]
