"""The BentoML service, its request and response schema."""
