"""A strict reading of a page with the standard library: what a browser would quietly repair or fetch is a fault here."""

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "hr", "input"}
FETCHING = {"src", "srcset", "data", "poster", "action", "background"}


class Page(HTMLParser):
    """The page's elements as (tag, attributes, text), and its faults."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.faults, self.open, self.elements = [], [], []
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag, _ in self.open]
        ids = [a["id"] for _, a, _ in self.elements if "id" in a]
        self.faults += [f"id {name} is there {ids.count(name)} times" for name in {n for n in ids if ids.count(n) > 1}]
        for tag, attributes, _ in self.elements:
            self._references(tag, attributes, ids)

    def _references(self, tag, attributes, ids):
        for name, value in attributes.items():
            value = value or ""
            where = f"<{tag} {name}={value[:60]!r}>"
            if name == "href" and value.startswith("#") and value[1:] not in ids:
                self.faults.append(f"{where} leads nowhere")
            elif (
                (name in ("href", "xlink:href") and tag != "a" and not value.startswith(("#", "data:")))
                or (name in FETCHING and not value.startswith("data:"))
                or ("url(" in value and "url(#" not in value)
            ):
                self.faults.append(f"{where} is fetched")
            elif "url(#" in value and value.split("url(#")[1].split(")")[0] not in ids:
                self.faults.append(f"{where} leads nowhere")
            elif name.startswith("on"):
                self.faults.append(f"{where} is a script")

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        if len(names) != len(set(names)):
            self.faults.append(f"<{tag}> has an attribute twice")
        element = (tag, dict(attributes), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append((tag, element))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if not any(name == "svg" for name, _ in self.open):
            self.faults.append(f"<{tag}/> closes itself outside an svg")

    def handle_endtag(self, tag):
        if not self.open or self.open[-1][0] != tag:
            self.faults.append(f"</{tag}> where <{self.open[-1][0] if self.open else 'nothing'}> is open")
        else:
            self.open.pop()

    def handle_data(self, data):
        for _, element in self.open:
            element[2].append(data)

    def all(self, tag, **wanted):
        """(attributes, text) of the elements with this tag and these attributes (`class_` for class)."""
        wanted = {name.rstrip("_"): value for name, value in wanted.items()}
        return [(a, "".join(t)) for name, a, t in self.elements if name == tag and all(a.get(k) == v for k, v in wanted.items())]
