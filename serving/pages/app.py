"""`forecart pages`: a small server-rendered application over the files of a project.

It reads, and writes nothing. Addresses name pages only: what is shown is chosen by query
parameters that are looked up or parsed, never by paths.
"""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlencode

import uvicorn
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.config import PARAMS_FILE, TargetsConfig, load_params
from pipelines.errors import UserError
from pipelines.evaluation.charts import Line, line_chart
from pipelines.evaluation.report import (
    METRIC_NAMES,
    format_days,
    format_figure,
    format_percent,
)
from pipelines.evaluation.rivals import CANDIDATE
from pipelines.events import VERBS
from pipelines.io import say_count
from pipelines.model.heads import Target
from pipelines.registry.verdict import find_verdict
from pipelines.scoring import DESCRIPTION, SCORES, find_doubt
from serving.pages.board import BINS, SEGMENTS, STEPS, Board
from serving.pages.quality import Quality, find_row, read_curve, read_quality
from serving.pages.shopper import REASONS, Storyteller, name_event
from serving.run import check_address

T = TypeVar("T")

HERE: Final = Path(__file__).parent

# Pages load their own style sheet and script, nothing else from anywhere; nobody may frame them.
SECURITY: Final = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

LOOPBACK: Final = ("127.0.0.1", "localhost")

_HITS: Final = 50
# Effects are told with two places.
_LEAST_EFFECT: Final = 0.005
_MAX_ID: Final = 1024
_METRICS: Final = {
    "binary": ("roc_auc", "pr_auc", "brier", "ece", "lift_at_10pct"),
    "amount": ("gini", "mae", "top_decile_capture", "total_ratio"),
}
_DRAWN: Final = ("champion", CANDIDATE, "lightgbm", "oracle")
_NOUNS: Final = {"purchase": "buyers", "search": "searchers", None: "leavers"}

_log = logging.getLogger(__name__)


class Protect:
    """ASGI middleware that puts the security headers on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def add_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    *((k.encode(), v.encode()) for k, v in SECURITY.items()),
                ]
            await send(message)

        await self.app(scope, receive, add_headers)


class Pages:
    """Handlers. They are plain functions, so that Starlette runs them on threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._stamp: int | None = None
        self._board: Board | None = None
        self._teller: Storyteller | None = None
        self.environment = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=StrictUndefined,
        )
        self.environment.filters |= {
            "days": format_days,
            "count": lambda value: f"{value:,.0f}",
            "of": say_count,
            "figure": format_figure,
            "percent": format_percent,
            "money": lambda value: f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}",
            "when": lambda value: value.strftime("%Y-%m-%d %H:%M"),
            "short": lambda digest: digest.removeprefix("sha256:")[:12] if digest else "none",
            "event": name_event,
            "verb": _name_act,
        }

    # -- handlers ------------------------------------------------------------------------------

    def overview(self, request: Request) -> Response:
        """Who will buy, search and leave; whom to reach."""
        board, whole = self._choose_board(request)
        if not len(board):
            everyone = urlencode(dict(request.query_params) | {"scope": "all"})
            raise _Empty("Nobody to show", "No shopper was active lately.", f"?{everyone}")
        first = _choose(self._find_days(), board.horizons, board.horizons[0])
        days = _choose(_integer(request, "days", first), board.horizons, first)
        targets = board.targets_at(days)
        binary = [t for t in targets if t.kind == "binary"]
        if not binary:
            raise _Empty("No probabilities", f"The model predicts none for {days} days.", "/")
        names = [t.name for t in binary]
        target = binary[names.index(_choose(request.query_params.get("target"), names, names[0]))]
        # The same question at every horizon that has it.
        asked = [t for t in board.targets if (t.kind, t.event) == ("binary", target.event)]
        by = _choose(request.query_params.get("by"), list(SEGMENTS), next(iter(SEGMENTS)))
        spend = next((t for t in targets if t.kind == "amount"), None)
        reach = board.reach(target.name)
        total = float(reach.hits[-1])
        # Only the shop knows these: there is no profit to tell until both are entered.
        cost, margin = _amount(request, "cost"), _amount(request, "margin")
        known = cost is not None and margin is not None
        profit = reach.profit(cost=cost or 0.0, margin=margin or 0.0) if known else None
        share = min(max(_integer(request, "share", 20), 0), STEPS)
        # The curve of the model that made the scores, which need not be the newest candidate.
        row = find_row(board.plan["model"], find_verdict(self.root))
        observed = read_curve(self.root, "lift", target.name).get(row or "", [])
        # It was tested on the shoppers of late, and says nothing of all others.
        scope = request.query_params.get("scope", "active")
        if scope == "all" and board.plan["active_within_days"] is not None:
            observed = []
        lines = [
            Line(
                name="expected",
                points=[(k / STEPS, reach.hits[k] / max(total, 1e-9)) for k in range(STEPS + 1)],
            )
        ]
        if observed:
            points = [(0.0, 0.0), *((r["share"], r["captured"]) for r in observed)]
            lines.append(Line(name="happened", points=points))
        counts, end = board.histogram(target.name)
        noun = _NOUNS.get(target.event)
        those = f"the {noun}" if noun else f"those who {_name_act(target)}"
        return self._render(
            "overview.html",
            board=board,
            whole=whole,
            scope=scope,
            days=days,
            targets=targets,
            sums={t.name: float(board.values(t.name).sum()) for t in targets},
            binary=binary,
            target=target,
            elsewhere={t.horizon_days: t.name for t in asked},
            noun=noun or those,
            those=those,
            spend=spend,
            by=by,
            kinds=list(SEGMENTS),
            segments=board.segments(by),
            share=share,
            cost=_enter(cost),
            margin=_enter(margin),
            contacted=int(reach.contacted[share]),
            hits=float(reach.hits[share]),
            total=total,
            profit=None if profit is None else float(profit[share]),
            lowest=float(reach.lowest[share]),
            bars=_bars(counts, end, int(reach.contacted[share])),
            ticks=[end * part / 4 for part in range(5)],
            observed=bool(observed),
            doubt=find_doubt(self.root, board.plan["model"]),
            chart=line_chart(
                lines,
                x_label="share of the shoppers reached",
                y_label=f"share of {those}",
                x_range=(0.0, 1.0),
                y_range=(0.0, 1.0),
                diagonal=True,
            ),
            data=json.dumps(
                {
                    "contacted": reach.contacted.tolist(),
                    "hits": [round(v, 3) for v in reach.hits.tolist()],
                    "lowest": [format_percent(v) for v in reach.lowest.tolist()],
                }
            ),
        )

    def audience(self, request: Request) -> Response:
        """Return the shoppers of the slider's top share as CSV."""
        board, _ = self._choose_board(request)
        name = request.query_params.get("target", "")
        if name not in [t.name for t in board.targets if t.kind == "binary"]:
            raise HTTPException(404, "There is no such target.")
        share = min(max(_integer(request, "share", 20), 0), STEPS)
        file = f"{name}-top{share}.csv"
        return StreamingResponse(
            board.audience(name, share),
            media_type="text/csv; charset=utf-8",
            headers={"content-disposition": f'attachment; filename="{file}"'},
        )

    def shopper(self, request: Request) -> Response:
        """One shopper, or a way to find one."""
        board = self._load_board()
        user_id = request.query_params.get("id")
        if not user_id:
            return self._list_shoppers(request, board)
        row = board.find(user_id[:_MAX_ID])
        if row is None:
            return self._render(
                "message.html",
                status=404,
                title="No such shopper",
                text=f"Nobody called “{user_id[:80]}” was scored. Ids are told apart by case.",
                link=("/shopper", "Find a shopper"),
            )
        binary = [t for t in board.targets if t.kind == "binary"]
        story, trouble = None, None
        try:
            first = self._find_target(board)
            name = request.query_params.get("target", first.name if first else None)
            story = self._load_teller(board).tell(row, name)
        except UserError as error:
            trouble = f"{error}; run: forecart score"
        chart, legend = "", []
        if story is not None:
            lines = [Line(name=n, points=p, dots=True) for n, p in story.curves.items()]
            legend = [_WORDS.get(line.name, line.name) for line in lines]
            chart = line_chart(
                lines,
                x_label="days from now",
                y_label="probability",
                x_range=(0.0, float(board.horizons[-1])),
                y_range=(0.0, 1.0),
            )
        return self._render(
            "shopper.html",
            board=board,
            row=row,
            binary=binary,
            events=list(dict.fromkeys(t.event for t in binary)),
            amounts=[t for t in board.targets if t.kind == "amount"],
            story=story,
            trouble=trouble,
            chart=chart,
            legend=legend,
            reasons=_split(story.reasons) if story else ([], []),
            moved=_split(story.moved) if story else ([], []),
        )

    def _list_shoppers(self, request: Request, board: Board) -> Response:
        text = request.query_params.get("q", "")[:_MAX_ID]
        target = self._find_target(board)
        if text:
            rows = board.search(text, limit=_HITS)
        elif target is not None:
            rows = board.table.take(board.order(target.name)[:_HITS]).to_pylist()
        else:
            rows = board.table.slice(0, _HITS).to_pylist()
        return self._render(
            "shoppers.html", board=board, rows=rows, text=text, target=target, most=_HITS
        )

    def model(self, request: Request) -> Response:
        """The champion, how good it is, and where it comes from."""
        quality = read_quality(self.root)
        targets = (quality.evaluation or {"targets": {}})["targets"]
        names = sorted(targets, key=lambda n: _by_kind(n, targets[n]))
        days = self._find_days()
        # The first of the horizon that matters most, a purchase where one was evaluated.
        first = [f"purchase_{days}d", *(n for n in names if targets[n]["horizon_days"] == days)]
        first = [n for n in first if n in names] or names
        name = _choose(request.query_params.get("target"), names, next(iter(first), ""))
        chart, drawn = None, []
        if name and targets[name]["kind"] == "binary":
            rows = read_curve(self.root, "calibration", name)
            drawn = [m for m in _DRAWN if m in rows]
            points = {m: [(r["predicted"], r["observed"]) for r in rows[m]] for m in drawn}
            top = max((max(p) for ps in points.values() for p in ps), default=1.0)
            chart = line_chart(
                [Line(name=m, points=points[m], dots=True) for m in drawn],
                x_label="predicted",
                y_label="happened",
                x_range=(0.0, max(0.1, top)),
                y_range=(0.0, max(0.1, top)),
                diagonal=True,
            )
        return self._render(
            "model.html",
            quality=quality,
            names=names,
            name=name,
            found=targets.get(name),
            metrics=_METRICS[targets[name]["kind"]] if name else (),
            metric_names=METRIC_NAMES,
            models=[m for m in quality.models if name and m in targets[name]["models"]],
            chart=chart if drawn else None,
            drawn=drawn,
            called=_name_models(quality),
            plan=self._load_board().plan if self._has_scores() else None,
        )

    def health(self, _request: Request) -> Response:
        """Say that the process answers."""
        return Response("ok\n", media_type="text/plain")

    # -- errors --------------------------------------------------------------------------------

    def refuse(self, _request: Request, error: Exception) -> Response:
        """Show an error of HTTP."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        text = str(getattr(error, "detail", "")) if status != 404 else ""
        title = "This page does not exist" if status == 404 else "This cannot be shown"
        return self._render(
            "message.html", status=status, title=title, text=text, link=("/", "To the overview")
        )

    def explain_empty(self, _request: Request, error: Exception) -> Response:
        """Show that there is nothing to show, and what to do about it."""
        if isinstance(error, _Empty):
            title, text, link = error.title, error.text, (error.link, "Show what there is")
        else:
            title, text, link = "Nothing to show yet", str(error), ("/model", "To the model")
        return self._render("message.html", status=200, title=title, text=text, link=link)

    def fail(self, _request: Request, _error: Exception) -> Response:
        """Show that something broke; the log tells what."""
        return self._render(
            "message.html",
            status=500,
            title="Something broke",
            text="The terminal in which forecart pages runs tells what.",
            link=("/", "To the overview"),
        )

    # -- state ---------------------------------------------------------------------------------

    def _has_scores(self) -> bool:
        return (self.root / SCORES / DESCRIPTION).is_file()

    def _find_days(self) -> int:
        """Return the horizon that matters most to the shop."""
        try:
            return load_params(self.root / PARAMS_FILE).targets.primary_horizon_days
        except UserError:
            return TargetsConfig().primary_horizon_days

    def _find_target(self, board: Board) -> Target | None:
        """Return the first probability of that horizon, else of any."""
        binary = [t for t in board.targets if t.kind == "binary"]
        days = self._find_days()
        return next((t for t in binary if t.horizon_days == days), next(iter(binary), None))

    def _load_board(self) -> Board:
        """Return the scores, read again when they have been made anew."""
        if not self._has_scores():
            raise UserError("No shopper has been scored. Run: forecart score")
        with self._lock:
            stamp = (self.root / SCORES / DESCRIPTION).stat().st_mtime_ns
            if self._board is None or stamp != self._stamp:
                self._board, self._teller = Board.load(self.root), None
                self._stamp = stamp
            return self._board

    def _load_teller(self, board: Board) -> Storyteller:
        with self._lock:
            if self._teller is None:
                self._teller = Storyteller(self.root, board.plan)
            return self._teller

    def _choose_board(self, request: Request) -> tuple[Board, Board]:
        whole = self._load_board()
        everyone = request.query_params.get("scope") == "all"
        return (whole if everyone else whole.active), whole

    def _render(self, template: str, /, *, status: int = 200, **values: Any) -> Response:
        return HTMLResponse(self.environment.get_template(template).render(**values), status)


# What the curves of the events are called.
_WORDS: Final = {"any": "comes back", "purchase": "buys", "search": "searches"}


class _Empty(UserError):
    """There is nothing to show for this choice."""

    def __init__(self, title: str, text: str, link: str) -> None:
        super().__init__(text)
        self.title, self.text, self.link = title, text, link


def create_app(root: Path, *, hosts: tuple[str, ...] = LOOPBACK) -> ASGIApp:
    """Return the application.

    Args:
        root: the project's folder.
        hosts: names under which it may be asked; a page of somebody else's that resolves to this
            machine (DNS rebinding) asks under another.
    """
    pages = Pages(root)
    app = Starlette(
        routes=[
            Route("/", pages.overview),
            Route("/audience.csv", pages.audience),
            Route("/shopper", pages.shopper),
            Route("/model", pages.model),
            Route("/livez", pages.health),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={
            HTTPException: pages.refuse,
            UserError: pages.explain_empty,
            Exception: pages.fail,
        },
    )
    # Around everything: Starlette answers to a failure outside of its own middleware.
    return Protect(app)


def show(root: Path, *, host: str, port: int) -> None:
    """Serve the pages until interrupted.

    Raises:
        UserError: the address cannot be bound.
    """
    check_address(host, port)
    app = create_app(root, hosts=LOOPBACK if host in LOOPBACK else ("*",))
    uvicorn.run(app, host=host, port=port, log_level="warning", server_header=False)


def _choose(value: T | None, allowed: list[T], otherwise: T) -> T:
    return value if value is not None and value in allowed else otherwise


def _name_act(target: Target) -> str:
    """Return what a shopper does or not; to leave is to do nothing."""
    return VERBS.get(target.event, target.event) if target.event else "leave"


def _by_kind(name: str, target: dict[str, Any]) -> tuple[bool, str, int]:
    return target["kind"] != "binary", name.rpartition("_")[0], target["horizon_days"]


def _name_models(quality: Quality) -> dict[str, str]:
    """Say whose rows those of the champion and of the candidate are."""
    version = quality.champion.version
    if quality.row == CANDIDATE:
        now = f"{CANDIDATE} (champion, version {version})"
        return {CANDIDATE: now, "champion": "champion before"}
    called = {CANDIDATE: f"{CANDIDATE} (candidate)"}
    if quality.row == "champion":
        called["champion"] = f"champion (version {version})"
    elif "champion" in quality.models:
        called["champion"] = "another champion"
    return called


def _integer(request: Request, name: str, otherwise: int) -> int:
    text = request.query_params.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else otherwise


def _enter(amount: float | None) -> str:
    """Return an amount as it was entered."""
    return "" if amount is None else f"{amount:.12g}"


def _amount(request: Request, name: str) -> float | None:
    try:
        value = float(request.query_params.get(name, ""))
    except ValueError:
        return None
    return value if 0 <= value < 1e9 else None


def _bars(counts: Any, end: float, contacted: int) -> list[dict[str, Any]]:
    """Lay a histogram out on a 100 x 40 canvas.

    Args:
        counts: shoppers in BINS equal parts of [0, end].
        end: the highest score of the canvas.
        contacted: how many are reached, those with the highest scores first.

    Returns:
        The bars of the parts in which somebody is, ascending.
    """
    top = max(int(counts.max()), 1)
    left = contacted
    bars: list[dict[str, Any]] = []
    for i, n in reversed(list(enumerate(counts.tolist()))):
        if not n:
            continue
        reached = min(left, n)
        left -= reached
        height = max(38 * n / top, 0.3)
        bars.append(
            {
                "x": 100 * i / BINS + 0.3,
                "width": 100 / BINS - 0.6,
                "height": height,
                "reached": height * reached / n,
                "low": end * i / BINS,
                "high": end * (i + 1) / BINS,
                "n": n,
            }
        )
    return bars[::-1]


def _split(items: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return what raises and what lowers, but for what shows as zero."""
    shown = [item for item in items if abs(item.effect) >= _LEAST_EFFECT]
    up = [item for item in shown if item.effect > 0][:REASONS]
    return up, [item for item in shown if item.effect < 0][:REASONS]
