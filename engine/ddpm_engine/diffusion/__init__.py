"""The diffusion process: schedules, parameterizations and closed forms. It knows no network."""
