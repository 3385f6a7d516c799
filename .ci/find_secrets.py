"""
Looks for secrets in all files that git tracks or would add, and fails if there is one. Needs no network.

    python .ci/find_secrets.py [FOLDER]

A line that must look like one, e.g. in a test, ends with the words "not a secret".
"""

import re
import subprocess
import sys
from pathlib import Path


# Without `\b` in front, which would make the search ten times slower
KINDS = {
    "token of Hugging Face": r"hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}",
    "key of OpenAI, Anthropic or a like API": r"sk-[A-Za-z0-9_-]{20,}",
    "token of GitHub": r"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,}",
    "token of GitLab": r"glpat-[A-Za-z0-9_-]{20,}",
    "token of PyPI": r"pypi-AgE[A-Za-z0-9_-]{50,}",
    "token of npm": r"npm_[A-Za-z0-9]{36}\b",
    "key of AWS": r"(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "key of Google": r"AIza[A-Za-z0-9_-]{35}",
    "token of Slack": r"xox[abeprs]-[A-Za-z0-9-]{10,}",
    "signed token (JWT)": r"eyJ[A-Za-z0-9_-]{15,}\.eyJ[A-Za-z0-9_-]{15,}\.[A-Za-z0-9_-]{15,}",
    "private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----",
    "password in an address": r"://[^\s/:@\"'{}<>$]+:[^\s/:@\"'{}<>$]{6,}@[A-Za-z0-9]",
    "assigned secret": r"(?i)(?:secret|passw(?:or)?d|api_?key|access_?key|auth_?token|hub_token|wandb_key)\b"
    r"[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9+/_=-]{20,}",
}


def find_secrets(folder: Path) -> list[str]:
    """The places of secrets in a repository, without the secrets themselves."""
    listing = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = []
    for name in subprocess.run(listing, check=True, capture_output=True).stdout.split(b"\0"):
        file = folder / name.decode("utf-8", "surrogateescape")
        if not name or not file.is_file():
            continue
        text = file.read_bytes().decode("latin-1")
        found += [f"{file.relative_to(folder)}, line {number}: {kind}" for number, kind in secrets_in(text)]
    return found


def secrets_in(text: str) -> list[tuple[int, str]]:
    """The line and the kind of each secret in a text."""
    found = []
    for kind, pattern in KINDS.items():
        for match in re.finditer(pattern, text):
            start, end = text.rfind("\n", 0, match.start()) + 1, text.find("\n", match.start())
            before = text[match.start() - 1 : match.start()]
            if before.isascii() and before.isalnum() and kind not in ("assigned secret", "password in an address"):
                continue  # the middle of a word, as in task-…
            if "not a secret" in text[start : None if end < 0 else end]:
                continue
            # Placeholders repeat a few characters, and names of variables have no digits.
            value = re.split(r"[:=]", match[0])[-1] if kind == "assigned secret" else match[0]
            is_random = len(set(value)) > 10 and any(letter.isdigit() for letter in value)
            if is_random or kind in ("private key", "password in an address"):
                found.append((text.count("\n", 0, start) + 1, kind))
    return found


if __name__ == "__main__":
    places = find_secrets(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
    for place in places:
        print(place)
    if places:
        sys.exit("Remove these secrets, from the history too, and revoke them. See .ci/find_secrets.py for examples.")
