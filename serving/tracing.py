"""Traces: switched on by OpenTelemetry's own variables, off without them.

BentoML makes a span of every request, and one for each message of it, and needs to be told to send
them; where to, with which headers and certificates, the exporter reads from OTEL_EXPORTER_OTLP_*
itself. Addresses of one shopper are left out, since a span holds the address.
"""

from __future__ import annotations

import os
from typing import Any, Final

from pipelines.errors import UserError

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
RATE: Final = "OTEL_TRACES_SAMPLER_ARG"

_DEFAULT_RATE: Final = 1.0
# A search in the whole address: not what merely begins so.
_EXCLUDED: Final = ["/users/(?!predict$|erase$)", "/livez$", "/readyz$", "/healthz$", "/metrics$"]


def plan_tracing() -> dict[str, Any]:
    """Return BentoML's settings of traces; none is made where no collector is named.

    Raises:
        UserError: the share of the requests to trace is none.
    """
    if not any(os.environ.get(name) for name in ENDPOINTS):
        # BentoML makes spans all the same, and drops them.
        return {"excluded_urls": [".*"]}
    text = os.environ.get(RATE, str(_DEFAULT_RATE))
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0.0 <= rate <= 1.0:
        raise UserError(f"{RATE}: {text!r} is not between 0 and 1")
    return {
        "exporter_type": "otlp",
        "sample_rate": rate,
        "excluded_urls": _EXCLUDED,
        "otlp": {"protocol": "http"},
    }
