"""The predecessor of a version and its anchored recipe."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from slmops.contracts.commands import PackageView, VariantView, VersionView
from slmops.contracts.descriptor import Descriptor, digest_of
from slmops.contracts.jobs import OptimizeJob
from slmops.contracts.model import ModelFile
from slmops.contracts.profile import EDGE_SMALL
from slmops.optimizer.recipes.ancestry import _beside_its_base, predecessor, recipe_on
from slmops.optimizer.recipes.library import check, recipe_named

AT = datetime(2030, 1, 1, tzinfo=UTC)


def version(
    name: str, recipe: str | None = "int4", profile: str = "edge-small", state: str = "registered"
) -> VersionView:
    """Returns a version with a package of one variant, or without a package."""
    packages, variants = (), ()
    if recipe:
        manifest = Descriptor.of(f"manifest {name}".encode(), "m")
        variants = (
            VariantView(
                model="tiny",
                version=name,
                profile=profile,
                recipe=recipe,
                digest=digest_of(name.encode()),
                gate="passed",
                chosen=True,
            ),
        )
        packages = (
            PackageView(profile=profile, recipe=recipe, manifest=manifest, signature=manifest, size_bytes=1, at=AT),
        )
    return VersionView(
        model="tiny",
        version=name,
        digest=digest_of(name.encode()),
        format="gguf",
        architecture="llama",
        size_bytes=1,
        state=state,
        at=AT,
        variants=variants,
        packages=packages,
    )


@pytest.mark.parametrize(
    ("versions", "found"),
    [
        ([version("1.0.0"), version("1.0.1"), version("1.0.2", None)], "1.0.1"),
        ([version("1.0.0"), version("1.0.1", None), version("1.0.2", None)], "1.0.0"),
        ([version("1.0.0"), version("1.0.1", state="retired"), version("1.0.2", None)], "1.0.0"),
        ([version("1.0.0"), version("1.0.1", profile="edge-large"), version("1.0.2", None)], "1.0.0"),
        ([version("1.0.0"), version("1.0.2"), version("1.0.3")], "1.0.0"),
        ([version("1.0.0"), version("1.0.1")], "1.0.1"),
        ([version("1.0.2", None)], None),
        ([], None),
    ],
    ids=["the one before", "none packaged", "retired", "other profile", "again", "not listed yet", "first", "none"],
)
def test_the_predecessor_is_the_newest_earlier_version_with_a_package(versions, found):
    before = predecessor(versions, "1.0.2", "edge-small")
    assert (before.version if before else None) == found


def test_the_anchored_recipe_has_the_same_name_for_all_versions():
    for recipe in ("int4", "int4-anchored"):
        before = predecessor([version("1.0.0", recipe)], "1.0.1", "edge-small")
        assert before is not None
        made = recipe_on(before)
        assert made.name == "int4-anchored"
        assert made.anchored_on == before.variant
        assert check(made)


@pytest.mark.parametrize(
    ("format_", "recipe", "beside"),
    [("adapter", "int4-adaptable", True), ("adapter", "int4", False), ("hf", "int4-adaptable", False)],
)
def test_an_adapter_beside_its_base_gets_no_anchored_recipe(format_, recipe, beside):
    job = OptimizeJob(
        model="tiny",
        version="1.0.1",
        digest=digest_of(b"files"),
        format=format_,
        files=(ModelFile(path="x", digest=digest_of(b"x"), size_bytes=1),),
        profile=EDGE_SMALL,
        recipes=(recipe,),
        definitions=(recipe_named(recipe),),
    )
    assert _beside_its_base(job) is beside
