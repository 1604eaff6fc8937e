// What a node of this pack shows on itself after it ran: a colour and a badge for the verdict, the
// report, words in colour, two images under a slider, a mask over an image. nodes/panel.py says what
// comes. Everything is text or an image of this server: nothing is parsed as HTML.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const KEY = "unmemorize";
const PROGRESS = "$$node-text-preview"; // the page's own widget for progress text
const WIDTH = 300;
const PADDING = 36; // its own, and the margin that the page keeps around such widgets
const COLORS = {
    memorized: { title: "#8a2c36", badge: "#c93a48" },
    changed: { title: "#5b3f8a", badge: "#7d57bd" },
    ordinary: { title: "#2a6340", badge: "#2f8a55" },
    "no verdict": { title: "#6b5420", badge: "#94742b" },
};
const NEUTRAL = { badge: "#4a5568" };
const shown = new WeakMap(); // node: {badge, title color, the color that the user had given, state, run}
let run = null; // id of the prompt that runs

const STYLE = `
.unmemorize-panel{box-sizing:border-box;width:100%;padding:4px 8px 10px;overflow:hidden auto;
 font:13px/1.5 system-ui,sans-serif;color:var(--input-text,#ddd);text-align:start}
.unmemorize-panel .badge{display:inline-block;padding:1px 9px;border-radius:9px;color:#fff;
 font-weight:600}
.unmemorize-panel details{margin-top:4px;white-space:pre-wrap;overflow-wrap:anywhere}
.unmemorize-panel summary{cursor:pointer}
.unmemorize-panel .words{margin-top:6px;line-height:2;overflow-wrap:anywhere}
.unmemorize-panel .words span{padding:2px 4px;border-radius:3px}
.unmemorize-panel .images{display:flex;flex-wrap:wrap;gap:4px;margin-top:6px}
.unmemorize-panel .layers{position:relative;flex:1 1 128px;max-width:512px;line-height:0}
.unmemorize-panel .layers img{width:100%;pointer-events:none;user-select:none}
.unmemorize-panel .layers img+img{position:absolute;inset:0;height:100%}
.unmemorize-panel .mask img+img{mix-blend-mode:multiply}
.unmemorize-panel label{display:flex;gap:8px;align-items:center;margin-top:4px}
.unmemorize-panel input{flex:1;min-width:60px;margin:0}`;

function element(tag, className, text = "") {
    const made = document.createElement(tag);
    made.className = className;
    made.textContent = text;
    return made;
}

function image({ filename, subfolder, type }, alt) {
    const made = element("img", "");
    made.alt = alt;
    made.src = api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
    return made;
}

/** A row of images, each with a second one over it that a slider reveals. */
function layers(kind, below, above, [left, right], reveal) {
    const row = element("div", `images ${kind}`);
    below.forEach((one, index) => {
        const box = element("div", "layers");
        box.append(image(one, left), image(above[index % above.length], right));
        row.append(box);
    });
    const label = element("label", "", left);
    const slider = element("input", "");
    Object.assign(slider, { type: "range", min: 0, max: 100, value: 50, ariaLabel: `${left}, ${right}` });
    slider.addEventListener("input", () => {
        row.querySelectorAll("img + img").forEach((img) => reveal(img.style, Number(slider.value)));
    });
    label.append(slider, element("span", "", right));
    slider.dispatchEvent(new Event("input"));
    return [row, label];
}

function draw(root, panel) {
    const [headline, ...rest] = panel.text.split("\n");
    const badge = element("span", "badge", panel.badge);
    badge.style.background = (COLORS[panel.state] ?? NEUTRAL).badge;
    root.replaceChildren(badge);
    if (rest.length) {
        const details = element("details", "");
        details.append(element("summary", "", headline), rest.join("\n"));
        root.append(details);
    } else {
        root.append(element("div", "", headline));
    }
    if (panel.words) {
        const line = element("div", "words");
        for (const [word, share] of panel.words) {
            const span = element("span", "", word);
            span.style.background = `rgba(201, 58, 72, ${share})`;
            span.title = `${Math.round(100 * share)} %`;
            line.append(span, " ");
        }
        root.append(line);
    }
    if (panel.before && panel.after) {
        const reveal = (style, value) => (style.clipPath = `inset(0 0 0 ${100 - value}%)`);
        root.append(...layers("pair", panel.before, panel.after, ["before", "after"], reveal));
    }
    if (panel.images && panel.mask) {
        const reveal = (style, value) => (style.opacity = value / 100);
        root.append(...layers("mask", panel.images, [panel.mask], ["image", "mask"], reveal));
    }
    // A pointer that moves a slider or opens the report must not drag the node.
    root.querySelectorAll("input, summary").forEach((control) => {
        control.addEventListener("pointerdown", (event) => event.stopPropagation());
    });
}

function panelWidget(node) {
    const known = node.widgets?.find((widget) => widget.name === KEY);
    if (known) return known;
    const root = element("div", "unmemorize-panel");
    const content = element("div", "");
    root.append(content);
    const options = {
        serialize: false,
        hideOnZoom: false,
        getMinHeight: () => content.offsetHeight + PADDING,
    };
    const widget = node.addDOMWidget(KEY, "unmemorize", root, options);
    widget.serialize = false; // not among the values of a saved workflow
    widget.content = content;
    // Text wraps when the page has given it its width, and images have a height once they are there.
    new ResizeObserver(() => {
        const [width, tall] = node.computeSize();
        node.setSize([Math.max(node.size[0], width, WIDTH), Math.max(node.size[1], tall)]);
        node.setDirtyCanvas(true, true);
    }).observe(content);
    return widget;
}

function mark(node, panel) {
    const before = shown.get(node);
    // Of several results inside of one subgraph, in one run, the worst is the one to see.
    if (before?.run === run && before.state === "memorized") return;
    const { title, badge } = COLORS[panel.state] ?? NEUTRAL;
    const own = before && node.color === before.title ? before.own : node.color;
    node.color = title ?? own;
    const made = new window.LGraphBadge({ text: panel.badge, fgColor: "#fff", bgColor: badge });
    // Of the canvas: Nodes 2.0 reads badges only when it builds a node, and has the panel's.
    node.badges = [...node.badges.filter((one) => one !== before?.badge), made];
    shown.set(node, { title: node.color, own, badge: made, state: panel.state, run });
}

/** The subgraph nodes around a node that runs, outermost first, and the node itself. */
function along(id) {
    let graph = app.rootGraph ?? app.graph;
    const nodes = [];
    for (const part of String(id).split(":")) {
        const node = graph?.getNodeById(part);
        if (!node) return [];
        nodes.push(node);
        graph = node.subgraph;
    }
    return nodes;
}

/** Whether several subgraph nodes stand for the graph that a node lies in: it has one panel for all. */
function isShared(node) {
    const root = app.rootGraph ?? app.graph;
    const graphs = [root, ...(root.subgraphs?.values() ?? [])];
    const all = graphs.flatMap((graph) => graph.nodes.filter((one) => one.subgraph === node.graph));
    return all.length > 1;
}

function show(node, panel) {
    const progress = node.widgets?.findIndex((widget) => widget.name === PROGRESS) ?? -1;
    if (progress >= 0) {
        node.widgets[progress].onRemove?.();
        node.widgets.splice(progress, 1);
    }
    mark(node, panel);
    draw(panelWidget(node).content, panel);
}

app.registerExtension({
    name: "Unmemorize.Panel",
    setup() {
        document.head.append(element("style", "", STYLE));
        api.addEventListener("execution_start", ({ detail }) => (run = detail.prompt_id));
        // What an earlier run said is no longer there while a node runs again, and after it failed.
        api.addEventListener("executing", ({ detail }) => {
            const earlier = (node) => shown.has(node) && shown.get(node).run !== run;
            const nodes = detail === null ? [] : along(detail?.display_node ?? detail);
            nodes.filter(earlier).forEach((node) => mark(node, { state: "", badge: "running" }));
        });
        api.addEventListener("executed", ({ detail }) => {
            const panel = detail.output?.[KEY]?.[0];
            const nodes = along(detail.display_node ?? detail.node);
            if (!panel || !nodes.length) return;
            const node = nodes.pop();
            if (panel.state) nodes.forEach((holder) => mark(holder, panel));
            if (!isShared(node)) show(node, panel);
        });
    },
    nodeCreated(node) {
        // A workflow is saved with the user's own color, not with a verdict's.
        const { onSerialize } = node;
        node.onSerialize = function (saved) {
            onSerialize?.call(this, saved);
            const kept = shown.get(this);
            if (!kept || saved.color !== kept.title) return;
            if (kept.own === undefined) delete saved.color;
            else saved.color = kept.own;
        };
    },
});
