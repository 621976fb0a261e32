"""Forecart: predicts for every shopper whether they will buy, search, spend or leave."""

__version__ = "0.1.0"
