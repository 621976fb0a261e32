"""The behaviour model: tokens, network, heads, training, calibration."""
