"""What `unmemorize concept` prints: tables, one JSON document."""

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...shared.training.concept.adapter import ConceptAdapter
    from ...shared.training.concept.subspace import ConceptSubspace
    from ...shared.training.examination import Examination, LayerShare
    from ...shared.training.layers.subspaces import LayerSubspaces


def document(subspace: "ConceptSubspace") -> dict[str, Any]:
    """Return a subspace's size and provenance."""
    size = {"schema_version": 1, "width": subspace.width, "rank": subspace.rank}
    return size | dict(subspace.provenance)


def lines(subspace: "ConceptSubspace") -> list[tuple[str, str]]:
    """Return the lines of a subspace's table."""
    made = subspace.provenance
    rows = [("dimensions", f"{subspace.rank} of {subspace.width}")]
    parts = zip(made.get("concepts", ()), made.get("ranks", ()), made.get("residuals", ()),
                strict=False)  # fmt: skip
    for concept, rank, missed in parts:
        rows.append((
            concept["names"][0],
            f"{', '.join(concept['names'])} against {concept['neutral']}: {rank} dimensions, "
            f"{missed:.1%} of it outside{_limit(made, 'residual')}",
        ))  # fmt: skip
    if "collateral" in made:
        rows.append(("other text inside", f"{made['collateral']:.1%}{_limit(made, 'collateral')}"))
    for name in made.get("not_separable", ()):
        rows.append(("not separable", f"{name}: no subspace of this text encoder would pass"))
    if learnt := made.get("learnt"):
        rows.append((
            "learnt",
            f"from {learnt['pictures']} images in {learnt['steps']} steps: loss from "
            f"{learnt['loss_before']:.3f} to {learnt['loss_after']:.3f}",
        ))  # fmt: skip
    for key in ("captions", "settings"):
        if key in made:
            rows.append((key, ", ".join(f"{k} {v}" for k, v in made[key].items())))
    if "templates" in made:
        rows.append(("templates", str(len(made["templates"]))))
    if "accepted" in made:
        rows.append(("accepted", "yes" if made["accepted"] else "NO, it was forced"))
    return rows


def adapter_document(made: "ConceptAdapter") -> dict[str, Any]:
    """Return what a concept's file says of itself."""
    return {"schema_version": 1} | dict(made.account)


def adapter_lines(made: "ConceptAdapter") -> list[tuple[str, str]]:
    """Return the lines of a table of a concept's file."""
    account = made.account
    how, numbers, model = account["made"], account["numbers"], account["model"]
    taught = f" in {how['steps']} steps, rank {how['rank']}" if "steps" in how else ""
    source = how.get("file") or f"{how['concept_images']} images"
    return [
        ("named", ", ".join(made.names) or "no name: trainers need a list of images, or all"),
        ("model", f"{model['pipeline']}, sha256 {model['sha256'][:12]}"),
        ("learnt", f"from {source}{taught}"),
        ("lowers the loss", f"of the concept's held-out images by {numbers['concept']:.4f}, of "
         f"others by {numbers['others']:.4f}"),
        ("tells apart", f"{numbers['recall']:.0%} of the concept's above {numbers['threshold']:.4f}"
         f", {numbers['false_positives']:.0%} of others"),
    ]  # fmt: skip


def layer_document(layers: "LayerSubspaces") -> dict[str, Any]:
    """Return the sizes and the provenance of subspaces of layers."""
    ranks = {name: basis.shape[1] for name, basis in layers.bases.items()}
    return {"schema_version": 1, "ranks": ranks} | dict(layers.provenance)


def layer_lines(layers: "LayerSubspaces") -> list[tuple[str, str]]:
    """Return the lines of a table of subspaces of layers."""
    made = layers.provenance
    ranks = sorted(basis.shape[1] for basis in layers.bases.values())
    rows = [
        ("layers", str(len(ranks))),
        ("dimensions", f"{ranks[0]} to {ranks[-1]} a layer, half of them up to {median(ranks):g}"),
    ]
    if names := made.get("names"):
        rows.append(("named", ", ".join(names)))
    if held_out := made.get("held_out"):
        rows.append((
            "images held out",
            f"{held_out['concept']:.1%} of the concept's inside, {held_out['retained']:.1%} of the "
            "others', median over layers",
        ))  # fmt: skip
    if layers.regions is None:
        rows.append(("places", "none: made by an earlier version, or no layer separates places"))
    elif places := made.get("places"):
        rows.append((
            "places held out",
            f"{places['concept']:.1%} of the concept's show it, {places['retained']:.1%} of the "
            "others'",
        ))  # fmt: skip
    for key in ("pictures", "settings"):
        if key in made:
            rows.append((key, ", ".join(f"{k} {v}" for k, v in made[key].items())))
    return rows


def _limit(made: Mapping[str, Any], name: str) -> str:
    limits = made.get("limits", {})
    return f" (at most {limits[name]:.0%})" if name in limits else ""


def findings(examination: "Examination | None", read: "Mapping[str, LayerShare]") -> dict[str, Any]:
    """Return the one JSON document of `test`."""
    from dataclasses import asdict

    measured = {} if examination is None else {
        "residuals": dict(examination.residuals),
        "collateral": examination.collateral,
        "within": examination.within,
        "prompts": [asdict(each) | {"within": each.within} for each in examination.prompts],
    }  # fmt: skip
    return {"schema_version": 1} | measured | {"lora": {name: asdict(read[name]) for name in read}}


def tables(examination: "Examination | None", read: "Mapping[str, LayerShare]") -> list[tuple]:
    """Return the tables of `test`."""
    made = [] if examination is None else _text_tables(examination)
    if read:
        lines = [
            (name, "no subspace" if layer.share is None else f"{layer.share:.1e}",
             "yes" if layer.within else "NO")
            for name, layer in read.items()
        ]  # fmt: skip
        columns = ["layer", "|A V| / |A|", "rounding only"]
        made.append(("What the LoRA reads of the subspace", columns, lines))
    return made


def _text_tables(examination: "Examination") -> list[tuple]:
    from ...shared.training.concept.fitting import COLLATERAL, RESIDUAL

    rows = [(f"{name} outside", f"{share:.1%}", f"{RESIDUAL:.0%}")
            for name, share in examination.residuals.items()]  # fmt: skip
    rows.append(("other text inside", f"{examination.collateral:.1%}", f"{COLLATERAL:.0%}"))
    made = [("Held-out sentences and captions", ["what", "share", "at most"], rows)]
    if examination.prompts:
        lines = [
            (each.prompt, f"{each.named} outside" if each.named else "inside", f"{each.share:.1%}")
            for each in examination.prompts
        ]
        made.append(("Prompts", ["prompt", "what", "share"], lines))
    return made
