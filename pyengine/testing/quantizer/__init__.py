"""Properties of a symmetric group quantizer, planted faults, and the suite that runs them."""
