"""What a page holds, as a browser would read it."""

from html.parser import HTMLParser

VOID = {"meta", "img", "input", "br", "source"}


class Reader(HTMLParser):
    """Collects elements, attributes and text as a browser would, and checks the nesting."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self.raw = [], "", {}
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            self.raw[self.open[-1]] = self.raw.get(self.open[-1], "") + data
        else:
            self.text += data

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]
