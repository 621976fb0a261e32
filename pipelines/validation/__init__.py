"""Great Expectations over the events."""
