"""The bias of the Fréchet distance is what the benchmark's text says."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.frechet_bias import expected_bias, of_digits, of_normals

from ddpm_engine.evaluation.digits import digit_classifier, real_digits


def test_samples_of_one_distribution_have_the_bias_in_closed_form() -> None:
    few, many = of_normals(16, [200, 3200], repeats=10)
    assert np.mean(few) == pytest.approx(expected_bias(16, 200), rel=0.1)
    assert np.mean(many) == pytest.approx(expected_bias(16, 3200), rel=0.1)


def test_few_digits_bias_the_frechet_and_not_the_kernel_distance() -> None:
    digits = digit_classifier(8).features(real_digits(8).images)
    (few, many), (kernel, _) = of_digits(digits, [50, 400], repeats=8)
    assert np.mean(few) > 4 * np.mean(many)
    error = np.std(kernel, ddof=1) / len(kernel) ** 0.5
    assert abs(np.mean(kernel)) < 4 * error
