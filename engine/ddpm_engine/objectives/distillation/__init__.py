"""Distillation objectives: students that sample in few steps."""
