"""The pack as ComfyUI shows it: names, tooltips, help pages, translations, time to import."""

import json

import pytest
from comfyui import newest, pack

pytestmark = pytest.mark.comfy
TITLE = 21  # characters that fit a node's title at its default width


def nodes() -> dict:
    """Return of every node what a translation may replace, and more."""
    found = {}
    for cls in pack("nodes").NODES:
        schema = cls.define_schema()
        found[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "category": schema.category,
            "inputs": {i.id: [i.display_name or i.id, i.tooltip] for i in schema.inputs},
            "outputs": [[o.display_name or o.id, o.tooltip] for o in schema.outputs],
        }
    return found


def registered() -> list:
    import nodes as comfyui_nodes

    return [name for name in comfyui_nodes.NODE_CLASS_MAPPINGS if name.startswith("Unmemorize")]


def test_every_node_is_registered_in_every_version(comfy):
    assert set(comfy.call(nodes)) == set(comfy.call(registered)) - {"UnmemorizeTestKeep"}


@newest
def test_names_and_tooltips(comfy):
    for name, node in comfy.call(nodes).items():
        assert name.startswith("Unmemorize")
        assert len(node["display_name"]) <= TITLE, name
        assert node["category"] == "unmemorize"
        assert node["description"].endswith((".", ")"))
        for what, tooltip in [*node["inputs"].values(), *node["outputs"]]:
            assert tooltip, f"{name}: {what}"


@newest
def test_every_node_has_a_help_page(comfy, root):
    pages = {path.stem for path in (root / "web" / "docs").glob("*.md")}
    assert pages == set(comfy.call(nodes))


@newest
def test_every_english_text_is_shown_and_none_is_missing(comfy, root):
    """The nodes read the file; a text of a widget that is gone or renamed shows here."""
    expected = {
        name: {
            "display_name": node["display_name"],
            "description": node["description"],
            "inputs": {i: {"name": n, "tooltip": t} for i, (n, t) in node["inputs"].items()},
            "outputs": {
                str(i): {"name": n, "tooltip": t} for i, (n, t) in enumerate(node["outputs"])
            },
        }
        for name, node in comfy.call(nodes).items()
    }
    for node in expected.values():
        for part in ("inputs", "outputs"):
            if not node[part]:
                del node[part]
    assert json.loads((root / "locales/en/nodeDefs.json").read_text("utf-8")) == expected


def shape(texts: dict | str) -> object:
    return {key: shape(text) for key, text in texts.items()} if isinstance(texts, dict) else None


@pytest.mark.parametrize("language", ["zh", "ja", "ko"])
def test_translations_are_complete(root, language):
    english, other = (
        json.loads((root / "locales" / code / "nodeDefs.json").read_text("utf-8"))
        for code in ("en", language)
    )
    assert shape(other) == shape(english)
    same = [
        name for name in english if english[name]["description"] == other[name]["description"]
    ]  # fmt: skip
    assert not same
