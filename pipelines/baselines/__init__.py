"""What the model must beat, fitted in the same run."""
