"""Time cuts, metrics, paired bootstrap and the report."""
