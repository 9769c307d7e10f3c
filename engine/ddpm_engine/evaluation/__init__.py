"""Evaluation: metrics of samples and likelihoods."""
