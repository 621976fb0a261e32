"""Gate policy, promotion and lineage."""
