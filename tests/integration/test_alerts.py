"""The alerts in Prometheus' own tool: they fire when they should, and not else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.access import USER

ALERTS = Path(__file__).resolve().parents[2] / "deploy/monitoring/alerts.yaml"
RULES: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
PROMTOOL = shutil.which("promtool")

if PROMTOOL is None:
    pytest.skip("needs promtool, of Debian's prometheus: make system", allow_module_level=True)


def test_prometheus_takes_the_rules() -> None:
    command = [str(PROMTOOL), "check", "rules", str(ALERTS)]
    subprocess.run(command, check=True, capture_output=True)


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    labels = {"job": "forecart", **labels}
    inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return {"series": f"{name}{{{inside}}}", "values": values}


COUNT = "forecart_request_seconds_count"
FIRING: dict[str, list[dict[str, str]]] = {
    "ForecartDown": [series("up", "0x60", pod="a")],
    "ForecartFails": [
        series(COUNT, "0+60x60", route="/predict", status="200"),
        series(COUNT, "0+6x60", route="/predict", status="503"),
    ],
    "ForecartLosesEvents": [series(COUNT, "0+6x60", route="/events", status="503")],
    "ForecartErasesNot": [series(COUNT, "0x30 1x30", route=USER, status="503")],
    "ForecartRefusesWork": [
        series(COUNT, "0+60x60", route="/predict", status="200"),
        series(COUNT, "0+6x60", route="/predict", status="429"),
    ],
    "ForecartRefusesModel": [series("forecart_model_swaps_total", "0x30 1x30", outcome="refused")],
    "ForecartModelsDiffer": [
        series("forecart_model_info", "1x60", digest="a", pod="a"),
        series("forecart_model_info", "1x60", digest="b", pod="b"),
    ],
    "ForecartGuessedKeys": [series(COUNT, "0+120x60", route="/predict", status="401")],
}
HEALTHY = [
    series("up", "1x60", pod="a"),
    series("up", "0x60", pod="b"),
    series(COUNT, "0+6000x60", route="/predict", status="200"),
    series(COUNT, "0+3x60", route="/predict", status="503"),
    series(COUNT, "0+60x60", route="/events", status="200"),
    series("forecart_model_swaps_total", "0x30 1x30", outcome="taken"),
    series("forecart_model_swaps_total", "0x60", outcome="refused"),
    series("forecart_model_info", "1x30 0x30", digest="a", pod="a"),
    series("forecart_model_info", "1x60", digest="b", pod="a"),
]


def test_alerts_fire_when_they_should_and_not_else(tmp_path: Path) -> None:
    def expect(alert: str, *, fires: bool) -> dict[str, Any]:
        count = [{"labels": "{}", "value": 1}] if fires else []
        asked = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
        return {"expr": asked, "eval_time": "50m", "exp_samples": count}

    tests = [
        {"interval": "1m", "input_series": given, "promql_expr_test": [expect(alert, fires=True)]}
        for alert, given in FIRING.items()
    ]
    quiet = [expect(rule["alert"], fires=False) for rule in RULES]
    tests.append({"interval": "1m", "input_series": HEALTHY, "promql_expr_test": quiet})
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "tests": tests}))
    run = subprocess.run(
        [str(PROMTOOL), "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
