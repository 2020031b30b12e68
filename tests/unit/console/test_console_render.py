"""Tables fit the terminal, show all important values, and pass no control characters to it."""

from __future__ import annotations

from datetime import timedelta
from io import StringIO

import pytest
from rich.console import Console, RenderableType
from unit.console.console_examples import (
    AT,
    NOW,
    blueprint,
    dead_letter,
    gateway,
    rollout,
    variant,
    version,
)

from slmops.console.render import fleet as render
from slmops.console.render import fleet_summary
from slmops.console.render.package import packages, verified
from slmops.contracts.commands import FleetSummary, PackageOfVersion, RolloutView, Tally
from slmops.contracts.commands.rollout import GatewayProblem
from slmops.contracts.descriptor import Descriptor
from slmops.contracts.errors import Problem
from slmops.contracts.manifest import FILE_PATH, WEIGHT, Manifest

_LAYER = Descriptor.of(b"x", WEIGHT, **{FILE_PATH: "tokenizer/tokenizer.json"})
MANIFEST = Manifest(config=_LAYER, layers=(_LAYER,))
APIS = {"gw-1": "http://127.0.0.1:28001"}
ESCAPE = "\x1b]0;owned\x07\x1b[2J"


def shown(table: RenderableType, width: int) -> str:
    out = StringIO()
    Console(file=out, width=width, highlight=False).print(table)
    return out.getvalue()


def with_attention() -> RolloutView:
    failed = GatewayProblem(
        gateway_id="gw-3", stage="canary", failed=True, problem="0 of 5 golden prompts pass", last_seen=AT
    )
    late = GatewayProblem(gateway_id="gw-2", stage="canary", failed=False)
    return rollout().model_copy(update={"attention": (failed, late)})


SUMMARY = FleetSummary(
    gateways=1200,
    online=1197,
    offline=3,
    standing=Tally(counts={"enrolled": 1200, "revoked": 7}),
    phase=Tally(counts={"committed": 1199, "failed": 1}),
    version=Tally(counts={"1.0.0": 1100, "none": 60}, others=40),
    blueprint=Tally(counts={"edge-chat": 1200}),
    profile=Tally(counts={"edge-small": 1200}),
    attention=Tally(counts={"revoked": 7, "failed": 1, "offline": 3, "clock": 0, "[b]new": 5}),
    at=NOW,
)


def tables(width: int) -> dict[str, RenderableType]:
    return {
        "versions": render.versions([version()], NOW, width),
        "version": render.version(version(), NOW, width),
        "variants": render.variants([variant(), variant("int8", chosen=False)], width),
        "blueprints": render.blueprints([blueprint()], NOW),
        "rollouts": render.rollouts([rollout("rolled_back")], NOW, width),
        "rollout": render.rollout(with_attention(), NOW),
        "summary": fleet_summary.summary(SUMMARY),
        "gateways": render.gateways([gateway(), gateway("gw-2", "0 of 5 golden prompts pass")], APIS, NOW, width),
        "gateway": render.gateway(gateway(problem="0 of 5 golden prompts pass"), "http://127.0.0.1:8001", NOW),
        "dead_letters": render.dead_letters([dead_letter()], NOW, width),
        "replayed": render.replayed([(17, "slmops.model.version_registered.v1", Problem(code="denied", what="no"))]),
    }


MUST_SHOW = {
    "versions": ["smollm2", "1.0.0", "packaged", "98.4 MB", "stable", "5 min"],
    "version": [
        "smollm2:1.0.0",
        "packaged",
        "sha256:",
        "int4-k-quant",
        "86.1 MB",
        "2026-03-01 11:55:00 UTC, 5 min ago",
    ],
    "variants": ["int4-k-quant", "chosen", "refused", "86.0 MB", "0.039", "91.2%", "91", "KL 0.612 is over 0.5"],
    "blueprints": ["edge-chat", "3", "smollm2", "edge-small", "none"],
    "rollouts": ["edge-chat", "smollm2:1.0.1", "rolled_back", "1/2 canary", "5 min", "0 of 5 golden"],
    "rollout": ["edge-chat to smollm2:1.0.1", "running", "canary", "gw-1 to commit", "waiting for", "never", "0 of 5"],
    "summary": ["1,200", "3", "revoked", "committed", "1.0.0", "none", "edge-small", "others", "100.0%", "failed"],
    "gateways": ["gw-1", "gw-2", "committed", "failed", "1.0.0", "1.0.0 *", "80", "3 s", APIS["gw-1"]],
    "gateway": ["gw-1", "ring=canary", "generation 4", "80.2", "http://127.0.0.1:8001", "error [inference_failed]"],
    "dead_letters": ["17", "optimizer", "invalid_message", "15 B", "5 min", "reason", "Field"],
    "replayed": ["17", "error [denied]: no"],
}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", MUST_SHOW)
def test_a_table_fits_the_terminal_without_cutting_important_values(name: str, width: int) -> None:
    text = shown(tables(width)[name], width)
    assert max(map(len, text.splitlines())) <= width
    for word in MUST_SHOW[name]:
        assert word in text
    assert "…" not in text


def test_digests_can_be_copied_in_one_piece_at_80_columns() -> None:
    package = PackageOfVersion(model="smollm2", version="1.0.0", **dict(version().packages[0]))
    found = gateway()
    for table, digests in (
        (render.version(version(), NOW, 80), [version().digest, version().packages[0].manifest.digest]),
        (render.gateway(found, None, NOW), [found.running, found.desired]),
        (packages([package], NOW), [package.manifest.digest]),
        (verified(package.manifest.digest, MANIFEST), [package.manifest.digest]),
    ):
        words = shown(table, 80).split()
        assert {digest for digest in digests if digest} <= {*words}


def test_a_wide_terminal_shows_more_columns() -> None:
    assert "ppl" not in shown(tables(80)["variants"], 80)
    assert "ppl" in shown(tables(120)["variants"], 120)


def test_foreign_text_is_neither_interpreted_as_markup_nor_by_the_terminal() -> None:
    hostile = shown(render.dead_letters([dead_letter(f"[bold]x[/bold]{ESCAPE}")], NOW, 120), 120)
    assert "[bold]x[/bold]" in hostile
    assert "\x1b" not in hostile
    assert "\x07" not in hostile
    assert "\x1b" not in shown(render.gateways([gateway(problem=ESCAPE)], {}, NOW, 80), 80)
    assert "\x1b" not in shown(render.answer(f"Paris{ESCAPE}"), 80)
    assert "\x1b" not in render.rollout_line(rollout().model_copy(update={"reason": ESCAPE}))


def test_payloads_are_not_shown_in_the_table() -> None:
    assert "secret" not in shown(render.dead_letters([dead_letter()], NOW, 200), 200)
    assert b"secret" not in dead_letter().model_dump_json().encode()
    assert "secret" not in repr(dead_letter())


def test_an_empty_list_shows_the_next_command() -> None:
    assert "slmops model push" in shown(render.versions([], NOW, 80), 80)
    assert "slmops rollout start" in shown(render.rollouts([], NOW, 80), 80)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (None, ""), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (98_362_432, "98.4 MB"), (99_960_000, "100 MB"),
        (538_000_000, "538 MB"), (999_400_000, "999 MB"), (999_600_000, "1.0 GB"), (2_500_000_000_000, "2500.0 GB"),
    ],
)  # fmt: skip
def test_sizes_are_decimal(size_bytes: int | None, text: str) -> None:
    assert render.size(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (200_000, "2 d")],
)
def test_durations_have_one_unit(seconds: int, text: str) -> None:
    assert render.duration(timedelta(seconds=seconds)) == text


def test_only_reasons_to_act_are_attention_items_and_each_names_a_few_gateways() -> None:
    found = fleet_summary.items(SUMMARY.attention.counts, {"offline": ["gw-1", "gw-2"], "failed": ["gw-9"]})
    assert [(item.kind, item.what) for item in found] == [
        ("gateways_failed", "1 gateway with a failed update, for example gw-9"),
        ("gateways_offline", "3 gateways offline, for example gw-1, gw-2"),
    ]
    assert found[0].fix.endswith("slmops gateway ls --attention failed")
    assert fleet_summary.figures(SUMMARY).startswith("1,200, 7 revoked, 1 with a failed update, 3 offline")
