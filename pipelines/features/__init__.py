"""Event sequences, snapshot features and labels."""
