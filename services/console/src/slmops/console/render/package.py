"""Renders packages as tables. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Group, RenderableType

from slmops.console.render.tables import Column, cell, duration, moment, or_else, pairs, short, size, table
from slmops.contracts.commands import PackageExport, PackageOfVersion, Withdrawal
from slmops.contracts.descriptor import Digest
from slmops.contracts.manifest import FILE_PATH, Manifest, PackageFile
from slmops.kit.oci_layout import signature_tag


def packages(views: Sequence[PackageOfVersion], now: datetime) -> RenderableType:
    columns: list[Column[PackageOfVersion]] = [
        Column("version", lambda p: f"{p.model}:{p.version}"),
        Column("profile", lambda p: p.profile),
        Column("recipe", lambda p: p.recipe),
        Column("size", lambda p: size(p.size_bytes), right=True),
        Column("age", lambda p: duration(now - p.at), right=True),
    ]
    made = or_else(table(views, columns), "No packages yet. Push a model: slmops model push PATH")
    # Whole, because other commands take them; below, because they are too long for a column.
    digests = pairs((f"{p.model}:{p.version} {p.profile}", p.manifest.digest) for p in views)
    return Group(made, "", digests) if views else made


def package(view: PackageExport, now: datetime) -> RenderableType:
    facts = pairs(
        [
            ("package", f"{view.model}:{view.version}"),
            ("profile", view.profile),
            ("recipe", view.recipe),
            ("manifest", view.manifest.digest),
            ("signature", view.signature.digest),
            ("size", size(view.size_bytes)),
            ("published", moment(view.at, now)),
        ]
    )
    columns: list[Column[PackageFile]] = [
        Column("file", lambda f: cell(f.path)),
        Column("kind", lambda f: cell(_kind(f.descriptor.media_type))),
        Column("size", lambda f: size(f.descriptor.size), right=True),
        Column("digest", lambda f: short(f.descriptor.digest)),
    ]
    return Group(facts, "", table(view.files, columns))


def exported(view: PackageExport, folder: Path) -> RenderableType:
    tag = signature_tag(view.manifest.digest)
    return pairs(
        [
            ("manifest", view.manifest.digest),
            ("layout", str(folder)),
            (
                "copy the package",
                f"skopeo copy oci:{folder}:{view.version} docker://REGISTRY/{view.model}:{view.version}",
            ),
            ("copy its signature", f"skopeo copy oci:{folder}:{tag} docker://REGISTRY/{view.model}:{tag}"),
        ]
    )


def verified(digest: Digest, manifest: Manifest) -> RenderableType:
    named = manifest.annotations
    version = f"{named.get('org.opencontainers.image.title')}:{named.get('org.opencontainers.image.version')}"
    layers = [(layer.annotations[FILE_PATH], size(layer.size)) for layer in manifest.layers]
    return pairs([("verified", version), ("manifest", digest), *layers])


def withdrawn(view: Withdrawal) -> RenderableType:
    return pairs(
        [
            ("would be withdrawn" if view.dry_run else "withdrawn", f"{view.model}:{view.version}"),
            ("profile", view.profile),
            ("manifest", view.manifest.digest),
            ("its deltas", f"{view.deltas}, {size(view.deltas_bytes)}" if view.deltas else "none"),
            ("gateways that run it", str(view.running)),
        ]
    )


def _kind(media_type: str) -> str:
    """Returns the kind in a media type, for example `weight` for `application/vnd.cncf.model.weight.v1.raw`."""
    return media_type.removeprefix("application/vnd.cncf.model.").partition(".v1")[0]
