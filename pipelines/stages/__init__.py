"""The DVC stages: each file reads its inputs, calls pure functions and writes its outputs."""
