"""The read tables on SQLite: events of other services arrive in any order, and twice."""

from __future__ import annotations

from itertools import permutations
from random import Random
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine
from unit.registry.registry_examples import T0, at, pushed, with_versions

from slmops.contracts.commands import VersionView
from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.evaluation import Evaluation
from slmops.contracts.events import (
    Event,
    ModelAliasMoved,
    ModelVersionRetired,
    PackagePublished,
    VariantOptimized,
    VariantProgressed,
    VariantRejected,
    VariantStarted,
)
from slmops.registry.store import project, schema, views

REGISTERED = with_versions(pushed("1.0.0")).versions["1.0.0"].event
JOB: dict[str, Any] = {"job": "j", "model": "smollm2", "version": "1.0.0", "profile": "edge-small"}
BLOB = Descriptor.of(b"blob", "application/json")
STARTED = VariantStarted(**JOB, recipes=("int8", "int4"), at=at(1))
QUANTIZING = VariantProgressed(**JOB, step="int4: quantize", done=1, of=4, at=at(2))
EVALUATING = VariantProgressed(**JOB, step="int4: evaluate", done=3, of=4, at=at(3))
INT4 = VariantOptimized(
    **JOB,
    recipe="int4",
    digest=digest_of(b"int4"),
    files=(),
    evaluation=Evaluation(bytes=7, kl=0.25),
    report=BLOB,
    chosen=True,
    reason="smallest",
    at=at(4),
)
NO_INT8 = VariantRejected(**JOB, recipe="int8", reason="too large", at=at(4))
NO_INT4 = VariantRejected(**JOB, recipe="int4", reason="too different", at=at(4))
PACKAGE = PackagePublished(
    model="smollm2",
    version="1.0.0",
    profile="edge-small",
    recipe="int4",
    variant=digest_of(b"int4"),
    manifest=BLOB,
    signature=BLOB,
    size_bytes=7,
    at=at(5),
)


def view(*events: Event) -> VersionView:
    with connected() as connection:
        for event in events:
            project(connection, event)
        [found] = views(connection)
        return found


def connected() -> Connection:
    engine = create_engine("sqlite://")
    schema().create_all(engine)
    return engine.connect()


@pytest.mark.parametrize(
    ("events", "stage", "progress"),
    [
        ((), "registered", ""),
        ((STARTED,), "optimizing", ""),
        ((QUANTIZING,), "optimizing", "edge-small: int4: quantize 1/4"),
        ((STARTED, QUANTIZING, EVALUATING, NO_INT8), "optimizing", "edge-small: int4: evaluate 3/4"),
        ((STARTED, EVALUATING, NO_INT8, INT4), "optimizing", "edge-small: int4 chosen, being packaged"),
        ((STARTED, EVALUATING, NO_INT8, INT4, PACKAGE), "packaged", ""),
        ((STARTED, EVALUATING, NO_INT8, NO_INT4), "refused", ""),
        ((NO_INT8, NO_INT4), "optimizing", ""),
    ],
)
def test_a_version_has_the_stage_of_its_events(events: tuple[Event, ...], stage: str, progress: str) -> None:
    orders = list(permutations((REGISTERED, *events)))
    for order in Random(1).sample(orders, min(len(orders), 24)):
        found = view(*order, *order)
        assert (found.stage, found.progress) == (stage, progress)


def test_a_view_contains_the_variants_and_packages_of_its_version() -> None:
    found = view(REGISTERED, STARTED, NO_INT8, INT4, PACKAGE)
    assert [(v.recipe, v.gate, v.chosen, v.reason) for v in found.variants] == [
        ("int4", "passed", True, "smallest"),
        ("int8", "refused", False, "too large"),
    ]
    assert found.variants[0].evaluation == INT4.evaluation
    [package] = found.packages
    assert (package.manifest, package.size_bytes, package.at) == (BLOB, 7, at(5))
    assert (found.state, found.at, found.size_bytes) == ("registered", T0, len("weights"))


def test_an_older_outcome_does_not_replace_a_newer_one() -> None:
    earlier = NO_INT4.model_copy(update={"at": at(1)})
    [variant] = view(REGISTERED, INT4, earlier).variants
    assert variant.gate == "passed"


def test_aliases_and_retirement_show() -> None:
    model = with_versions(pushed("1.0.0"), pushed("1.0.1", "b"))
    events = [v.event for v in model.versions.values()]
    with connected() as connection:
        for event in (
            *events,
            ModelAliasMoved(model="smollm2", alias="stable", version="1.0.0", at=T0),
            ModelAliasMoved(model="smollm2", alias="stable", version="1.0.1", previous="1.0.0", at=T0),
            ModelAliasMoved(model="smollm2", alias="canary", version="1.0.1", at=T0),
            ModelVersionRetired(model="smollm2", version="1.0.0", reason="old", at=T0),
        ):
            project(connection, event)
        shown = [(v.version, v.state, v.aliases) for v in views(connection)]
        assert shown == [("1.0.0", "retired", ()), ("1.0.1", "registered", ("canary", "stable"))]
        assert [v.version for v in views(connection, "smollm2", "1.0.1")] == ["1.0.1"]
        assert views(connection, "other") == []


def test_variants_of_an_unknown_version_wait_until_it_is_known() -> None:
    with connected() as connection:
        project(connection, INT4)
        assert views(connection) == []
        project(connection, REGISTERED)
        assert [v.recipe for v in views(connection)[0].variants] == ["int4"]
