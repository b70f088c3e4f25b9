#!/usr/bin/env bash
# Collects everything that an installation without the internet needs in one folder.
#
#   deploy/wheelhouse.sh wheelhouse                                    # torch as the ordinary index has it (CUDA)
#   TORCH_INDEX_URL=<PyTorch's CPU index> deploy/wheelhouse.sh wheelhouse      # CPU only, gigabytes smaller
#
# Run it on a machine with the internet that has the same Python (3.11, 3.12, ...), the same processor and a C
# library that is not newer than the target's. PYTHON names another interpreter than python3.
set -euo pipefail

if [ $# -ne 1 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
fi
python=${PYTHON:-python3}
source_folder=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
wheelhouse=$(cd "$1" && pwd)
if [ -n "$(ls -A "$wheelhouse")" ]; then
    printf '%s is not empty\nan old wheel among new ones would be installed\ngive a new folder\n' "$wheelhouse" >&2
    exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -c 'import sys; sys.exit("Python 3.11 or later is needed: PYTHON=python3.11") if sys.version_info < (3, 11) else None'
"$python" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip "$@"; }

# 1 The source, copied: building leaves nothing behind in the working tree.
mkdir "$work/source"
for part in pyproject.toml README.md LICENSE common server client simulations; do
    cp -R "$source_folder/$part" "$work/source/"
done

# 2 torch and torchvision from the index that was named, and nothing else from there.
: >"$work/constraints.txt"
if [ -n "${TORCH_INDEX_URL:-}" ]; then
    "$work/venv/bin/python" - "$work/source/pyproject.toml" >"$work/torch.txt" <<'PY'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    wanted = tomllib.load(file)["project"]["dependencies"]
print(*(line for line in wanted if line.startswith("torch")), sep="\n")
PY
    pip download --no-deps --only-binary :all: --dest "$wheelhouse" --index-url "$TORCH_INDEX_URL" \
        -r "$work/torch.txt"
    "$work/venv/bin/python" - "$wheelhouse" >"$work/constraints.txt" <<'PY'
import pathlib, sys
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    name, version = wheel.name.split("-")[:2]
    print(f"{name}=={version}")
PY
fi

# 3 Ours and everything that it needs; what has no wheel is built here, so that the target needs no compiler.
pip wheel --wheel-dir "$wheelhouse" --find-links "$wheelhouse" --constraint "$work/constraints.txt" "$work/source"

# 4 The list with one hash per file, and the sizes.
"$work/venv/bin/python" - "$wheelhouse" <<'PY'
import hashlib, pathlib, platform, sys
folder = pathlib.Path(sys.argv[1])
wheels = sorted(folder.glob("*.whl"))
lines, names = [], set()
for wheel in wheels:
    name, version = wheel.name.split("-")[:2]
    if name in names:
        sys.exit(f"two versions of {name}: start again with a new folder")
    names.add(name)
    lines.append(f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
requirements = folder / "requirements.txt"
requirements.write_text("".join(lines))
megabytes = {wheel.name.split("-")[0]: wheel.stat().st_size / 1e6 for wheel in wheels}
print()
for name in sorted(megabytes, key=megabytes.get, reverse=True)[:8]:
    print(f"{megabytes[name]:8.0f} MB  {name}")
print(f"{sum(megabytes.values()):8.0f} MB  in {len(wheels)} wheels, for Python "
      f"{sys.version_info.major}.{sys.version_info.minor} on {platform.machine()}, {' '.join(platform.libc_ver())}")
print(f"\nrequirements.txt has SHA-256 {hashlib.sha256(requirements.read_bytes()).hexdigest()}")
print("tell the hospital this number by another way than the files; every other hash is inside.")
PY
name=$(basename "$wheelhouse")
cat <<TEXT

Copy the folder to the machine without the internet. There:
  sha256sum $name/requirements.txt
  python3 -m venv /opt/hospital-federation
  /opt/hospital-federation/bin/pip install --no-index --find-links $name --require-hashes -r $name/requirements.txt
TEXT
