"""
Looks up the installed packages in the database of known vulnerabilities, with pip-audit.

    python .ci/audit.py

It fails if a package has a vulnerability that a newer version mends. Others are printed. Without a network it says
that nothing was audited, and does not fail.
"""

import json
import subprocess
import sys
from typing import Any


def report(dependencies: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """Lines about pip-audit's findings, and whether one of them can be mended."""
    lines, can_be_mended = [], False
    for package in dependencies:
        for vulnerability in package.get("vulns", []):
            versions = ", ".join(vulnerability["fix_versions"])
            can_be_mended |= bool(versions)
            remedy = f"install {versions}" if versions else "there is no mended version yet"
            lines.append(f"{package['name']} {package['version']}: {vulnerability['id']}; {remedy}")
    unknown = sum("skip_reason" in package for package in dependencies)
    lines.append(f"{len(dependencies) - unknown} of {len(dependencies)} packages were audited.")
    return lines, can_be_mended


def main() -> None:
    command = [sys.executable, "-m", "pip_audit", "--local", "--progress-spinner", "off", "--format", "json"]
    try:
        done = subprocess.run([*command, "--timeout", "5"], capture_output=True, text=True, timeout=180)
        dependencies = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):  # no network, or a database that does not answer
        print("No package was audited: pip-audit, or its database of vulnerabilities, cannot be reached.")
        return
    lines, can_be_mended = report(dependencies)
    print("\n".join(lines))
    if can_be_mended:
        sys.exit("Raise the lower bounds in pyproject.toml where they are ours, and install the mended versions.")


if __name__ == "__main__":
    main()
