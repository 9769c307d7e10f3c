"""Networks: what predicts the noise. They know no noise schedule."""
