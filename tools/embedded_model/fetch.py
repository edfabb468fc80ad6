"""Fetch the emoji packages with `npm pack` and unpack the parts that are used."""

import argparse
import subprocess
import tarfile
from pathlib import Path

# folder under DATA/raw -> (package, the paths inside the archive that are kept)
PACKAGES = {
    "noto": ("emoji-datasource-google@16.0.0", ("package/img/google/64/", "package/emoji.json")),
    "twemoji": ("emoji-datasource-twitter@16.0.0", ("package/img/twitter/64/",)),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", ("package/assets/",)),
    "fluentui": ("fluentui-emoji@1.3.0", ("package/icons/", "package/LICENSE")),
}


def archive_name(package: str) -> str:
    """The file name that `npm pack` gives a package: @scope/name@1.0 -> scope-name-1.0.tgz."""
    name, version = package.rsplit("@", 1)
    return f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"


def main() -> None:
    """Download what is missing, unpack what is not unpacked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="work folder, outside the repository"
    )
    args = parser.parse_args()
    archives, raw = args.data / "npm", args.data / "raw"
    archives.mkdir(parents=True, exist_ok=True)
    for folder, (package, keep) in PACKAGES.items():
        archive = archives / archive_name(package)
        if not archive.exists():
            subprocess.run(["npm", "pack", package], cwd=archives, check=True)
        if (raw / folder).exists():
            continue
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if m.name.startswith(keep)]
            tar.extractall(raw / folder, members=members, filter="data")
        print(f"{folder}: {len(members)} files from {package}")


if __name__ == "__main__":
    main()
