"""A page of a report, taken apart for the tests: tags, attributes, text, and the tables below each heading."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Collects what a reader sees, and fails on tags that do not nest.

    `rows` holds the rows of all tables, each as the texts of its cells, under the last `h2` before them.
    """

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.headings, self.summaries, self.badge, self.notices, self.rows = [], [], "", [], {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))
        table = self.rows.setdefault(self.headings[-1] if self.headings else "", [])
        if tag == "tr":
            table.append([])
        elif tag in ("td", "th"):
            table[-1].append("")
        elif tag in ("h2", "summary"):
            (self.headings if tag == "h2" else self.summaries).append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data + "\n"
        tags = [tag for tag, _ in self.open]
        classes = self.open[-1][1].split() if self.open else []
        if "h2" in tags:
            self.headings[-1] += data
        elif "summary" in tags:
            self.summaries[-1] += data
        elif "badge" in classes:
            self.badge, self.kind = data, classes[-1]
        elif "notice" in classes:
            self.notices.append(data)
        elif "td" in tags or "th" in tags:
            row = self.rows[self.headings[-1] if self.headings else ""][-1]
            row[-1] = " ".join(f"{row[-1]} {data}".split())
