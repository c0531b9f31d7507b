"""The built pages load nothing from the network: scripts, styles, pictures and fonts are all local.

python .ci/check_html.py HTML_DIRECTORY
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src"}
LOADING_LINKS = {"stylesheet", "preload", "prefetch", "preconnect", "icon", "modulepreload"}


class Loads(HTMLParser):
    """Collects the addresses that a browser fetches by itself (links to click are fine)."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        if tag in LOADING:
            self.addresses.append(attributes.get(LOADING[tag], ""))
        if tag == "link" and LOADING_LINKS & set(attributes.get("rel", "").split()):
            self.addresses.append(attributes.get("href", ""))


def remote(addresses: list[str]) -> list[str]:
    return [a for a in addresses if re.match(r"(https?:)?//", a)]


def main(html: Path) -> int:
    found = []
    pages = sorted(html.rglob("*.html"))
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        found += [f"{page.relative_to(html)}: {a}" for a in remote(loads.addresses)]
    for sheet in sorted(html.rglob("*.css")):
        text = sheet.read_text(encoding="utf-8", errors="replace")
        addresses = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", text)
        found += [f"{sheet.relative_to(html)}: {a}" for a in remote([x or y for x, y in addresses])]
    print("\n".join(found) or f"{len(pages)} pages, all of them complete without a network")
    return int(bool(found) or not pages)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
