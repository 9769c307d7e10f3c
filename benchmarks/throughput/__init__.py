"""Speed and memory of sampling and training, next to a textbook loop and to diffusers."""
