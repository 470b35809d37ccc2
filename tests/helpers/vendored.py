"""Fetch the page's vendored modules from npm's registry, by version: python tests/helpers/vendored.py

fastft/serve/web/vendor.json says which; change a version there, run this, and commit what it wrote: the files, unchanged, and
their hashes.
"""

import hashlib
import io
import json
import tarfile
import urllib.request
from pathlib import Path

WEB = Path(__file__).parents[2] / "fastft/serve/web"
LIST, FOLDER, HASHES = WEB / "vendor.json", WEB / "vendor", WEB / "vendor" / "SHA256SUMS"


def hashes() -> dict[str, str]:
    """SHA-256 by name of every file in the folder but the list of hashes."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(FOLDER.iterdir()) if path != HASHES
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for entry in json.loads(LIST.read_text()):
        base = entry["package"].rpartition("/")[2]
        url = f"https://registry.npmjs.org/{entry['package']}/-/{base}-{entry['version']}.tgz"
        with urllib.request.urlopen(url) as response, tarfile.open(fileobj=io.BytesIO(response.read())) as archive:
            for inside, name in entry["files"].items():
                (FOLDER / name).write_bytes(archive.extractfile(inside).read())
    HASHES.write_text("".join(f"{digest}  {name}\n" for name, digest in hashes().items()))


if __name__ == "__main__":
    main()
