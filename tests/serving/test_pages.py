"""The pages' answers without a browser: numbers, states, and what must not get through."""

from __future__ import annotations

import csv
import io
import re
import socket
from datetime import UTC, datetime, timedelta
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from pipelines.errors import UserError
from pipelines.io import read_json, write_json, write_text
from pipelines.model.timeline import feature_names
from pipelines.scoring import score
from serving.pages.app import _split, create_app
from serving.pages.board import Board
from serving.pages.shopper import Reason, describe_feature
from serving.run import check_address
from tests.test_scoring import make_project

AT = datetime(2025, 3, 1, tzinfo=UTC)
SERVES, WAITS, SCORES, ANOTHER = (f"sha256:{mark * 64}" for mark in "ab05")
MODELS = ("champion", "ensemble", "lightgbm")
EVIL = "<script>alert(1)</script>'\"=1+1/../"


def make_scores(root: Path, *, users: int = 200) -> None:
    rng = np.random.default_rng(1)
    ids = [EVIL, "=HYPERLINK(1)", *(f"u{i}" for i in range(users - 2))]
    purchase = rng.beta(1, 4, users)
    table = pa.table(
        {
            "user": np.arange(users, dtype=np.int32),
            "user_id": ids,
            "purchase_7d": pa.array(purchase / 2, pa.float32()),
            "churn_7d": pa.array(rng.random(users), pa.float32()),
            "spend_7d": pa.array(purchase * 10, pa.float32()),
            "purchase_14d": pa.array(purchase, pa.float32()),
            "next_purchase_ts": [AT + timedelta(days=3)] + [None] * (users - 1),
            "next_items": [[EVIL, "sku-7"]] + [[]] * (users - 1),
            "next_item_chances": [[0.5, 0.125]] + [[]] * (users - 1),
            "active": np.arange(users) % 4 > 0,
            "events": np.arange(users) % 9 + 1,
            "events_28d": np.arange(users) % 9,
            "first_event_ts": [AT - timedelta(days=i % 60 + 1) for i in range(users)],
            "last_event_ts": [AT - timedelta(hours=i + 1) for i in range(users)],
            "age": [None if i % 5 == 0 else float(15 + i % 60) for i in range(users)],
            "gender": pa.array([None] * users, pa.string()),
            "region": [EVIL if i % 3 == 0 else None for i in range(users)],
            "signup_ts": pa.array([None] * users, pa.timestamp("us", "UTC")),
        }
    )
    (root / "data/scores").mkdir(parents=True, exist_ok=True)
    pq.write_table(table, root / "data/scores/part-000000.parquet")
    events = {"purchase_7d": "purchase", "churn_7d": None, "purchase_14d": "purchase"}
    targets: list[dict[str, Any]] = [
        {"name": n, "kind": "binary", "event": e, "horizon_days": 14 if "14" in n else 7}
        for n, e in events.items()
    ]
    targets.append({"name": "spend_7d", "kind": "amount", "event": "purchase", "horizon_days": 7})
    plan = {"role": "candidate", "model": SCORES, "data": "sha256:1", "at": AT.isoformat()}
    plan |= {"format": 1, "users": users, "targets": targets, "active_within_days": 28}
    write_json(root / "data/scores/_scores.json", plan)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_scores(tmp_path)
    return tmp_path


def ask(root: Path, path: str) -> Any:
    app = create_app(root, hosts=("testserver",))
    return TestClient(app, raise_server_exceptions=False).get(path)


def test_a_shopper_is_told_what_comes_next(root: Path) -> None:
    page = ask(root, f"/shopper?id={quote(EVIL)}").text
    assert 'by <time datetime="2025-03-04T00:00:00+00:00">2025-03-04 00:00</time>' in page
    assert "sku-7 <small>12.5 %</small>" in page
    said = "chance that the next item viewed, carted or bought is this one"
    assert said in page
    assert EVIL not in page
    page = ask(root, "/shopper?id=u1").text
    assert "not to be expected within 14 days" in page
    assert "the model tells no items" in page
    assert said not in page


def test_events_are_told_where_their_texts_are_not_known(tmp_path: Path) -> None:
    score(make_project(tmp_path))
    found = ask(tmp_path, f"/shopper?id={quote('zoë, <b>')}")
    assert found.status_code == 200
    assert "<span>purchase <small>9.00</small></span>" in found.text


def test_reach_adds_up(root: Path) -> None:
    board = Board.load(root)
    reach = board.reach("purchase_14d")
    assert reach.contacted.tolist() == [2 * k for k in range(101)]
    assert reach.hits[100] == pytest.approx(board.values("purchase_14d").sum())
    top = np.sort(board.values("purchase_14d"))[::-1]
    assert reach.hits[10] == pytest.approx(top[:20].sum())
    assert reach.lowest[10] == pytest.approx(top[19])
    assert reach.profit(cost=1, margin=3)[10] == pytest.approx(3 * top[:20].sum() - 20)


def test_segments_add_up(root: Path) -> None:
    board = Board.load(root)
    for by in ("region", "age", "history"):
        segments = board.segments(by)
        assert sum(s.shoppers for s in segments) == 200
        total = sum(s.expected["spend_7d"] for s in segments)
        assert total == pytest.approx(board.values("spend_7d").sum())
    assert [s.name for s in board.segments("age")][:2] == ["0 to 24", "25 to 34"]
    names = [s.name.split()[0] for s in board.segments("history")]
    assert names == ["light", "new", "regular"]


def test_the_overview_counts_active_shoppers_unless_asked(root: Path) -> None:
    assert "150 active shoppers" in ask(root, "/").text
    assert "200 shoppers ever seen" in ask(root, "/?scope=all").text


@pytest.mark.parametrize("path", ["/?scope=all", "/?days=1", "/shopper", "/shopper?id=u1"])
def test_a_single_day_and_a_population_of_everyone_are_told_as_such(root: Path, path: str) -> None:
    plan = read_json(root / "data/scores/_scores.json") | {"active_within_days": None}
    for target in plan["targets"]:
        target["horizon_days"] = 1 if target["horizon_days"] == 7 else 14
    write_json(root / "data/scores/_scores.json", plan)
    horizons = "{horizons_days: [1, 14], primary_horizon_days: 1}"
    write_text(root / "params.yaml", f"targets: {horizons}\n")
    file = root / "data/scores/part-000000.parquet"
    table = pq.read_table(file)
    everyone = pa.array([True] * len(table))
    place = table.column_names.index("active")
    pq.write_table(table.set_column(place, "active", everyone), file)
    found = ask(root, path)
    assert found.status_code == 200
    assert "calibrated on shoppers seen in the last" not in found.text
    assert "1 day" in found.text or "next day" in found.text
    assert "1 days" not in found.text


def test_where_nobody_is_active_the_way_on_keeps_what_was_entered(root: Path) -> None:
    file = root / "data/scores/part-000000.parquet"
    table = pq.read_table(file)
    nobody = pa.array([False] * len(table))
    pq.write_table(table.set_column(table.column_names.index("active"), "active", nobody), file)
    answer = ask(root, '/?days=14&share=10&cost=1.5&margin=3&by="><b>&scope=active')
    assert "Nobody to show" in answer.text
    assert "<b>" not in answer.text
    (link,) = find_links(answer.text)
    entered = {"days": "14", "share": "10", "cost": "1.5", "margin": "3", "by": '"><b>'}
    assert link == entered | {"scope": "all"}


def test_one_is_told_as_one(root: Path) -> None:
    plan = read_json(root / "data/scores/_scores.json")
    file = root / "data/scores/part-000000.parquet"
    pq.write_table(pq.read_table(file).slice(9, 1), file)
    write_json(root / "data/scores/_scores.json", plan)
    assert "1 active shopper," in ask(root, "/").text
    assert "1 shopper ever seen," in ask(root, "/?scope=all").text
    assert "1 event since" in ask(root, "/shopper?id=u7").text


def test_sales_are_told_as_before_returns(root: Path) -> None:
    page = ask(root, "/?days=7").text
    assert "revenue" not in page
    assert '<span class="label">expected sales</span>' in page
    assert " each, before returns</span>" in page
    assert '<th scope="col">sales <small>before returns</small></th>' in page
    page = ask(root, "/shopper?id=u1").text
    assert '<th scope="row">spend <small>before returns</small></th>' in page


def test_the_form_works_without_a_script(root: Path) -> None:
    page = ask(root, "/?scope=all&days=14&target=purchase_14d&share=10&cost=1&margin=3").text
    expected = Board.load(root).reach("purchase_14d").profit(cost=1, margin=3)[10]
    assert '<dd id="contacted">20</dd>' in page
    assert f'<dd id="profit">{expected:,.2f}</dd>' in page


def find_links(page: str) -> list[dict[str, str]]:
    """Parameters of the overview's links to itself, in the page's order."""
    found = [unescape(query).partition("#")[0] for query in re.findall(r'href="\?([^"]*)"', page)]
    return [dict(parse_qsl(query, keep_blank_values=True)) for query in found]


def test_links_keep_what_was_entered(root: Path) -> None:
    entered = {"share": "30", "cost": "1.5", "margin": "4"}
    for page in ("/?days=7&", "/?days=7&scope=all&"):
        links = find_links(ask(root, page + urlencode(entered)).text)
        assert len(links) == 1 + 2 + 2 + 3  # scope, horizons, questions, segments
        assert all(entered.items() <= link.items() for link in links)
    for link in find_links(ask(root, "/").text):
        assert link["share"] == "20"
        assert "cost" not in link
        assert "margin" not in link


def test_another_horizon_keeps_the_question_where_it_has_it(root: Path) -> None:
    plan = read_json(root / "data/scores/_scores.json")
    asked = "/?days=7&target=churn_7d"
    links = {link["days"]: link["target"] for link in find_links(ask(root, asked).text)[1:3]}
    assert links == {"7": "churn_7d", "14": ""}  # nobody's leaving in 14 days was scored
    for target in plan["targets"]:
        if target["name"] == "purchase_14d":
            target["event"] = None
    write_json(root / "data/scores/_scores.json", plan)
    links = {link["days"]: link["target"] for link in find_links(ask(root, asked).text)[1:3]}
    assert links == {"7": "churn_7d", "14": "purchase_14d"}


def test_what_is_predicted_is_said_in_words(root: Path) -> None:
    plan = read_json(root / "data/scores/_scores.json")
    for target in plan["targets"]:
        if target["name"] == "purchase_14d":
            target["event"] = "add_to_cart"
    write_json(root / "data/scores/_scores.json", plan)
    page = ask(root, "/?days=14").text
    assert "add_to_cart" not in page
    assert "most likely to put something into the cart" in page
    assert "Share of those who put something into the cart found" in page
    assert "Share of the buyers found" in ask(root, "/?days=7").text


def test_the_histogram_colours_as_many_as_are_reached(root: Path) -> None:
    page = ask(root, "/?scope=all&days=14&target=purchase_14d&share=10").text
    drawn = re.findall(
        r"<title>([\d.]+) to ([\d.]+) %: (\d+) shoppers?</title>.*?"
        r'height="([\d.]+)" class="bar"/>.*?height="([\d.]+)" class="bar reached" data-n="(\d+)"',
        page,
        re.DOTALL,
    )
    scores = Board.load(root).values("purchase_14d")
    end = float(re.findall(r'class="end">([\d.]+) %', page)[0]) / 100
    assert end / 2.5 < scores.max() <= end
    counts, _ = np.histogram(scores, bins=20, range=(0, end))
    some = np.flatnonzero(counts)
    assert [int(n) for _, _, n, *_ in drawn] == counts[some].tolist()
    assert [float(low) for low, *_ in drawn] == pytest.approx(100 * end * some / 20)
    reached = [int(n) * float(part) / float(whole) for _, _, _, whole, part, n in drawn]
    assert sum(reached) == pytest.approx(20, abs=0.5)
    cut = np.sort(scores)[-20]
    for (low, high, n, *_), part in zip(drawn, reached, strict=True):
        inside = (scores >= cut) & (scores >= float(low) / 100) & (scores < float(high) / 100)
        assert part == pytest.approx(inside.sum(), abs=0.3), n


@pytest.mark.parametrize(
    ("scores", "end"),
    [([0.0003, 0.0031], 0.005), ([0.2, 0.1], 0.2), ([0.51], 1.0), ([1.0], 1.0), ([0.0], 0.00002)],
)
def test_the_histogram_ends_at_a_round_score(
    root: Path, scores: list[float], end: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Board.load(root)
    monkeypatch.setattr(board, "values", lambda name: np.array(scores))
    counts, found = board.histogram("purchase_14d")
    assert found == pytest.approx(end)
    assert counts.sum() == len(scores)


def test_what_shows_as_zero_neither_raises_nor_lowers() -> None:
    found = [Reason(text="", effect=effect) for effect in (0.3, 0.004, -0.0049, -0.005)]
    up, down = _split(found)
    assert [reason.effect for reason in up + down] == [0.3, -0.005]


def test_the_horizon_that_matters_most_is_shown_first(root: Path) -> None:
    judge(root, champion=SERVES, candidate=WAITS, passed=False)
    for days, other in ((7, 14), (14, 7)):
        settings = f"{{horizons_days: [7, 14], primary_horizon_days: {days}}}"
        write_text(root / "params.yaml", f"targets: {settings}\n")
        assert f"<h1>The next {days} days</h1>" in ask(root, "/").text
        assert f"<h1>The next {days} days</h1>" in ask(root, "/?days=99").text
        assert f"<h1>The next {other} days</h1>" in ask(root, f"/?days={other}").text
        listed = ask(root, "/shopper").text
        assert f"most likely to buy in {days} days" in listed
        evaluation = read_json(root / "reports/evaluation.json")
        (target,) = evaluation["targets"].values()
        both = {f"purchase_{d}d": target | {"horizon_days": d} for d in (7, 14)}
        write_json(root / "reports/evaluation.json", evaluation | {"targets": both})
        page = ask(root, "/model").text
        assert f'href="/model?target=purchase_{days}d" aria-current="true"' in page
        write_json(root / "reports/evaluation.json", evaluation)


@pytest.mark.parametrize("query", ["", "cost=1", "margin=3", "cost=1&margin=x"])
def test_there_is_no_profit_until_cost_and_margin_are_entered(root: Path, query: str) -> None:
    page = ask(root, f"/?{query}").text
    assert '<dd id="profit">\u2013</dd>' in page
    for name in ("cost", "margin"):
        entered = "1" if f"{name}=1" in query else "3" if f"{name}=3" in query else ""
        assert re.search(f'name="{name}"[^>]* value="{entered}"', page)


@pytest.mark.parametrize(
    "query",
    ["share=-1", "share=1e9", "share=²", "days=0", "days=x", "target=nope", "by=__class__",
     "cost=nan", "cost=inf", "margin=-1", "cost=%00", "scope=%ff"],
)  # fmt: skip
def test_odd_parameters_fall_back(root: Path, query: str) -> None:
    answer = ask(root, f"/?{query}")
    assert answer.status_code == 200
    assert "active shoppers" in answer.text
    assert "nan" not in answer.text.replace("finance", "")


def test_nothing_of_a_shopper_becomes_markup(root: Path) -> None:
    for path in ("/?by=region", "/shopper", "/shopper?q=%3Cscript", f"/shopper?id={EVIL}"):
        text = ask(root, path).text
        assert "<script>alert" not in text
        assert "alert(1)" in text


def test_an_id_finds_its_shopper_whatever_it_is_made_of(root: Path) -> None:
    app = create_app(root, hosts=("testserver",))
    answer = TestClient(app).get("/shopper", params={"id": EVIL})
    assert answer.status_code == 200
    assert "cannot be shown" in answer.text  # the model is not there: said, not broken
    assert ask(root, "/shopper?id=U1").status_code == 404
    assert ask(root, "/shopper?id=" + "x" * 5000).status_code == 404


def test_every_answer_is_fenced(root: Path) -> None:
    for path in ("/", "/static/style.css", "/nope", "/audience.csv?target=purchase_7d"):
        headers = ask(root, path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    app = create_app(root)
    rebound = TestClient(app, base_url="http://evil.example").get("/")
    assert rebound.status_code == 400


def measure_contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours."""

    def shine(colour: str) -> float:
        digits = colour if len(colour) == 6 else "".join(2 * c for c in colour)
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    dark, light = sorted((shine(one), shine(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(
    "file", ["serving/pages/static/style.css", "pipelines/evaluation/templates/report.html"]
)
def test_text_can_be_told_from_what_is_behind_it(file: str) -> None:
    text = (Path(__file__).parents[2] / file).read_text(encoding="utf-8")
    themes = re.findall(r":root \{([^}]*)\}", text)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): #(\w+)", theme))
        for name in ("ink", "soft", "s0", "good", "bad"):
            for behind in ("page", "card"):
                assert measure_contrast(colours[name], colours[behind]) >= 4.5, (name, behind)
        if "on" in colours:
            assert measure_contrast(colours["on"], colours["s0"]) >= 4.5


def test_paths_lead_nowhere_else(root: Path) -> None:
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd", "/static/"):
        assert ask(root, path).status_code in (404, 405)


def test_the_audience_is_the_top_share_and_safe_to_open(root: Path) -> None:
    answer = ask(root, "/audience.csv?target=purchase_14d&share=50&scope=all")
    assert answer.headers["content-disposition"] == 'attachment; filename="purchase_14d-top50.csv"'
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    scores = [float(row["purchase_14d"]) for row in rows]
    assert len(rows) == 100
    assert scores == sorted(scores, reverse=True)
    everyone = ask(root, "/audience.csv?target=purchase_14d&share=100&scope=all").text
    ids = {row["user_id"] for row in csv.DictReader(io.StringIO(everyone))}
    assert "'=HYPERLINK(1)" in ids
    assert "=HYPERLINK(1)" not in ids
    assert ask(root, "/audience.csv?target=user_id").status_code == 404
    assert ask(root, "/audience.csv?target=spend_7d").status_code == 404


def judge(root: Path, *, champion: str, candidate: str, passed: bool) -> None:
    """Leave an evaluation in which the champion is tested beside another candidate."""
    check = {"name": "validation", "passed": passed, "why": "it is so"}
    verdict = {"champion": champion, "candidate": candidate, "passed": passed, "checks": [check]}
    write_json(root / "reports/verdict.json", verdict | {"data": "sha256:3"})
    rows = ["target,model,share,captured,lift"]
    rows += ["purchase_14d,ensemble,0.5,0.75,1.5", "purchase_14d,champion,0.5,0.25,0.5"]
    write_text(root / "reports/plots/lift.csv", "\n".join(rows))
    rows = ["target,model,predicted,observed,rows"]
    rows += ["purchase_14d,ensemble,0.5,0.5,9", "purchase_14d,champion,0.25,0.5,9"]
    write_text(root / "reports/plots/calibration.csv", "\n".join(rows))
    values = {"roc_auc": {"value": 0.5, "low": 0.4, "high": 0.6}}
    values["ece"] = {"value": 0.5, "low": None, "high": None}
    target = {"kind": "binary", "horizon_days": 14, "models": dict.fromkeys(MODELS, values)}
    data = {"events": 9, "users": 9, "first_ts": "2025-01-01", "last_ts": "2025-02-01"}
    write_json(
        root / "reports/evaluation.json", {"data": data, "targets": {"purchase_14d": target}}
    )


def promote(root: Path, digest: str) -> None:
    write_json(root / "champion.json", {"digest": digest, "version": 3, "verdict": None})
    plan = read_json(root / "data/scores/_scores.json")
    write_json(root / "data/scores/_scores.json", plan | {"role": "champion", "model": digest})


def test_what_happened_is_told_of_the_model_that_made_the_scores(root: Path) -> None:
    judge(root, champion=SERVES, candidate=WAITS, passed=False)
    promote(root, SERVES)
    page = ask(root, "/?days=14").text
    assert "happened, when the champion was tested" in page
    assert "187.0 167.5" in page
    assert "187.0 62.5" not in page
    assert "These scores are by" not in page
    assert "happened, when" not in ask(root, "/?days=14&scope=all").text
    judge(root, champion=WAITS, candidate=SERVES, passed=True)
    page = ask(root, "/?days=14").text
    assert "187.0 62.5" in page
    judge(root, champion=WAITS, candidate=ANOTHER, passed=True)
    assert "happened, when" not in ask(root, "/?days=14").text


def test_scores_by_a_refused_candidate_are_told_as_such(root: Path) -> None:
    judge(root, champion=SERVES, candidate=SCORES, passed=False)
    page = ask(root, "/?days=14").text
    assert "These scores are by a candidate that failed the gate" in page
    assert "happened, when this model was tested" in page


def test_the_page_of_the_model_tells_champion_and_candidate_apart(root: Path) -> None:
    judge(root, champion=SERVES, candidate=WAITS, passed=False)
    promote(root, SERVES)
    page = ask(root, "/model").text
    assert "Version 3 is champion" in page
    assert '<tr class="ours"><th scope="row">champion (version 3)</th>' in page
    assert '<tr><th scope="row">ensemble (candidate)</th>' in page
    legend = page.split('class="legend"')[1]
    assert legend.index("champion (version 3)") < legend.index("ensemble (candidate)")
    assert page.count("0.400 to 0.600") == len(MODELS)  # of ROC-AUC, and none of ECE
    promote(root, WAITS)
    page = ask(root, "/model").text
    assert '<tr class="ours"><th scope="row">ensemble (champion, version 3)</th>' in page
    assert '<tr><th scope="row">champion before</th>' in page


def test_states_without_files_say_what_to_do(tmp_path: Path) -> None:
    assert "forecart score" in ask(tmp_path, "/").text
    assert "forecart score" in ask(tmp_path, "/shopper").text
    page = ask(tmp_path, "/model").text
    assert "There is no champion yet" in page
    assert "Nothing has been compared yet" in page


def test_damaged_files_do_not_break_a_page(root: Path) -> None:
    write_text(root / "reports/evaluation.json", "{")
    write_text(root / "reports/verdict.json", "[]")
    assert ask(root, "/model").status_code == 200
    write_text(root / "data/scores/_scores.json", "{}")
    broken = ask(root, "/")
    assert broken.status_code == 500
    assert "Something broke" in broken.text
    assert "default-src 'none'" in broken.headers["content-security-policy"]


def test_new_scores_show_up(root: Path) -> None:
    client = TestClient(create_app(root, hosts=("testserver",)))
    assert "200 shoppers" in client.get("/?scope=all").text
    make_scores(root, users=120)
    assert "120 shoppers" in client.get("/?scope=all").text


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(UserError, match="in use"):
            check_address("127.0.0.1", busy.getsockname()[1])


def test_every_feature_has_words() -> None:
    words = {name: describe_feature(name) for name in feature_names()}
    assert not [name for name, text in words.items() if "_" in text]
    assert words["add_to_cart_7d"] == "additions to the cart in the last days"
    assert words["active_day_ever"] == "days with a visit in all"
    assert words["gap_std_purchase_day"] == "rhythm of days with a purchase"
    assert words["after_purchase_add_to_cart"] == "additions to the cart since the last purchase"
