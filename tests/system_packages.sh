#!/bin/sh
# Installs the Debian packages that integration tests use, where apt may be used; says what is
# missing and how to get it where it may not. Never fails: a test that lacks one says so itself.
set -u
missing=""
PATH="$PATH:/usr/sbin:/sbin"
need() { # COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need java default-jre-headless
need chromium chromium
need chromedriver chromium-driver
# Debian keeps these off the path.
ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || missing="$missing postgresql"
[ -x /usr/sbin/mariadbd ] || missing="$missing mariadb-server"
need nginx nginx-light
need openssl openssl
for tool in buildah podman runc debootstrap; do
    need "$tool" "$tool"
done
# Of prometheus the tool alone: the package starts a server for everybody.
if ! command -v promtool >/dev/null 2>&1; then
    if command -v apt-get >/dev/null 2>&1 && [ -n "${BIN:-}" ]; then
        echo "Fetching promtool for the tests of alerts"
        folder=$(mktemp -d)
        fetch() { (cd "$folder" && apt-get download -qq prometheus && dpkg -x ./*.deb .) >/dev/null 2>&1; }
        { fetch || { [ "$(id -u)" = 0 ] && apt-get update -qq >/dev/null 2>&1 && fetch; }; } &&
            cp "$folder/usr/bin/promtool" "$BIN/" || echo "promtool could not be fetched" >&2
        rm -rf "$folder"
    else
        echo "Tests of alerts want promtool (Debian: package prometheus)" >&2
    fi
fi
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ]; then sudo=""; elif sudo -n true 2>/dev/null; then sudo="sudo -n"; else sudo="none"; fi
if command -v apt-get >/dev/null 2>&1 && [ "$sudo" != none ]; then
    echo "Installing for the integration tests:$missing"
    $sudo apt-get update -qq >/dev/null 2>&1
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $missing >/dev/null 2>&1 ||
        echo "apt-get could not install:$missing" >&2
else
    echo "Integration tests want these packages:$missing (for example: sudo apt-get install$missing)" >&2
fi
exit 0
