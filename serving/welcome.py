"""The page at `/`: what can be asked, for people.

BentoML's own page there loads a tag manager and badges from elsewhere. This one loads nothing at
all, and its policy lets it load nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, MutableMapping
from html import escape
from typing import Any, Final

from serving.middleware import App, Receive, Send

PATH: Final = "/"

_USER: Final = """{"user_id": "ada", "events": [
  {"ts": "2025-06-20T18:02:11Z", "event_type": "search", "query": "running shoes"},
  {"ts": "2025-06-20T18:03:40Z", "event_type": "view", "item_id": "sku-17", "price": 79.9}]}"""
_NOW: Final = '"now": "2025-06-21T00:00:00Z"'

# Calls, what they do, and a body to begin with where they take one.
CALLS: Final = (
    (
        "POST /predict",
        "Predicts shoppers from the events that are sent along.",
        f'{{"users": [{_USER}],\n "next_items": 5, {_NOW}}}',
    ),
    (
        "POST /explain",
        "Tells which events and counts moved a prediction. With user_id instead of user it "
        "explains a shopper whose events were collected.",
        f'{{"user": {_USER},\n "target": "purchase_14d", {_NOW}}}',
    ),
    (
        "POST /events",
        "Collects events.",
        '{"events": [{"user_id": "ada", "event_id": "e1", "ts": "2025-06-20T18:03:40Z",\n'
        '  "event_type": "view", "item_id": "sku-17", "category": "shoes", "price": 79.9}]}',
    ),
    (
        "PUT /users/ID",
        "Keeps what you know of a shopper.",
        '{"age": 36, "gender": "f", "region": "north", "signup_ts": "2025-01-10T00:00:00Z"}',
    ),
    ("GET /users/ID/prediction", "Predicts a shopper from what was collected.", ""),
    ("GET /users/ID/next-items", "Tells the items that may come next.", ""),
    (
        "GET /users/ID/explanation?target=purchase_14d",
        "Explains a shopper's prediction from what was collected.",
        "",
    ),
    (
        "POST /users/predict",
        "Predicts shoppers from what was collected.",
        '{"user_ids": ["ada", "bob"], "next_items": 5}',
    ),
    ("DELETE /users/ID", "Forgets a shopper.", ""),
    ("POST /users/erase", "The same, with the id in the body.", '{"user_id": "ada"}'),
)

# Addresses of the platform, and what they tell.
LINKS: Final = (
    ("/docs.json", "every call with its fields (OpenAPI)"),
    ("/readyz", "whether predictions can be had"),
    ("/livez", "whether the service runs"),
    ("/metrics", "figures for Prometheus"),
)

_STYLE: Final = """
:root { color-scheme: light dark; }
body { max-width: 50rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1rem; margin: 1.6rem 0 0; } p { margin: .2rem 0 .5rem; }
code, pre { font: .86rem/1.45 ui-monospace, monospace; overflow-wrap: anywhere; } h2 code { font-size: 1rem; }
pre { margin: 0; padding: .6rem .8rem; border: 1px solid #8884; border-radius: 6px; white-space: pre-wrap; }
"""  # noqa: E501
_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

_HEADERS: Final = {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class ShowCalls:
    """ASGI middleware that answers `/` with the page.

    Args:
        app: the application inside.
        find_digest: returns the digest of the model that serves; empty = none yet.
    """

    def __init__(self, app: App, find_digest: Callable[[], str]) -> None:
        self.app = app
        self._find_digest = find_digest

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        asked = scope["type"] == "http" and scope["path"] == PATH
        if not asked or scope["method"] not in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        page = render(self._find_digest()).encode()
        told = _HEADERS | {"content-length": str(len(page))}
        headers = [(name.encode(), value.encode()) for name, value in told.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        body = page if scope["method"] == "GET" else b""
        await send({"type": "http.response.body", "body": body})


def render(digest: str) -> str:
    """Return the page.

    Args:
        digest: of the model that serves; empty = none yet.
    """
    model = f"Model <code>{escape(digest)}</code>." if digest else "No model is loaded yet."
    links = "".join(f'<li><a href="{path}">{path}</a>: {what}</li>' for path, what in LINKS)
    calls = "".join(
        f"<h2><code>{escape(call)}</code></h2><p>{escape(what)}</p>"
        + (f"<pre>{escape(body)}</pre>" if body else "")
        for call, what, body in CALLS
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Forecart</title><style>{_STYLE}</style></head><body>"
        f"<h1>Forecart</h1><p>Predicts what shoppers do next. {model}</p>"
        "<p>Bodies are JSON. Where the service has a file of keys, send yours in the header "
        f"<code>X-API-Key</code>. ID is percent-encoded.</p><ul>{links}</ul>{calls}</body></html>"
    )
