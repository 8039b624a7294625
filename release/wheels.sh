#!/usr/bin/env bash
# Wheels into dist/, from the source distribution in it: `make wheel` calls this, with its tools on the path.
# Arguments: the Pythons to build for where there is no Docker.
set -euo pipefail
if docker info > /dev/null 2>&1; then
    exec cibuildwheel --platform linux --output-dir dist dist/*.tar.gz
fi
echo "No Docker here: wheels for $*, for a glibc as new as this machine's, instead of what pyproject.toml names."
raw=$(mktemp -d)
trap 'rm -rf "$raw"' EXIT
for python in "$@"; do
    NDM_FAST_REQUIRE_EXT=1 "$python" -m pip wheel --quiet --no-deps --wheel-dir "$raw" dist/*.tar.gz
done
for wheel in "$raw"/*.whl; do
    auditwheel show "$wheel"
    auditwheel repair --strip --wheel-dir dist "$wheel"
done
