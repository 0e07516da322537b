#!/bin/sh
# Fetches the Solstice agent for this machine and starts it. For any POSIX shell.
umask 077
dir=@DIR@
console=@CONSOLE@
url=@URL@
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
PATH=${PATH:-/usr/bin:/bin}:/usr/sbin:/sbin:/usr/local/bin:/usr/pkg/bin
export PATH

say() {
	printf 'solstice: %s\n' "$*" >>"$console" || printf 'solstice: %s\n' "$*"
} 2>/dev/null

fail() {
	say "$*"
	exit 1
}

have() {
	command -v "$1" >/dev/null 2>&1
}

bounded() { # COMMAND…, for what has no time limit of its own
	"$@" &
	job=$!
	(
		sleep 300 &
		nap=$!
		trap 'kill "$nap"; exit' TERM
		wait "$nap"
		kill "$job"
	) >/dev/null 2>&1 &
	dog=$!
	wait "$job"
	code=$?
	kill "$dog" 2>/dev/null
	return "$code"
}

get() { # URL FILE
	if have curl; then
		curl -fsS --connect-timeout 30 --speed-limit 1 --speed-time 30 -o "$2" "$1"
	elif have wget; then
		case $(wget --version 2>/dev/null) in
		*GNU*) wget -nv -t 1 -T 30 -O "$2" "$1" ;;
		*) bounded wget -q -O "$2" "$1" ;; # Debian's static busybox crashes with -T
		esac
	elif have fetch; then
		fetch -q -T 30 -o "$2" "$1"
	else
		bounded ftp -V -o "$2" "$1"
	fi
}

checksum() { # FILE
	if have sha256sum; then
		sha256sum <"$1"
	elif have sha256; then
		sha256 -q "$1"
	elif have digest; then
		digest -a sha256 "$1"
	elif have shasum; then
		shasum -a 256 <"$1"
	elif have openssl; then
		openssl dgst -sha256 -r <"$1"
	else
		fail "no sha256sum, sha256, digest, shasum or openssl to check the agent with"
	fi
}

os=$(uname -s | tr '[:upper:]' '[:lower:]')
case $os in
sunos) os=illumos ;;
esac
arch=$(uname -m)
case $arch in
x86_64 | amd64 | i86pc) arch=amd64 ;;
aarch64 | arm64 | evbarm) arch=arm64 ;;
esac
case $os/$arch in
@SUMS@
*) fail "there is no agent for $os/$arch" ;;
esac

have curl || have wget || have fetch || have ftp || fail "no curl, wget, fetch or ftp to download the agent with"
(umask 022 && mkdir -p "${dir%/*}") && mkdir -p "$dir" && cd "$dir" || fail "cannot make $dir"
say "fetching the agent for $os/$arch from $url"
got=
for wait in 0 @WAITS@; do
	sleep "$wait"
	rm -f agent.new
	if why=$(get "$url/$os/$arch" agent.new 2>&1); then
		got=$(checksum agent.new) || fail "${got:-cannot compute the SHA-256 of the agent}"
		got=${got%% *}
		if [ "$got" = "$want" ]; then
			break
		fi
		why="its SHA-256 is $got, want $want"
	fi
	got=
	say "the agent was not fetched: $why"
done
[ "$got" ] || fail "giving up: no agent"
chmod 700 agent.new
mv -f agent.new agent || fail "cannot keep the agent in $dir"

rm -f bootstrap.json
cat >bootstrap.json <<'solstice-bootstrap' || fail "cannot write to $dir"
@BOOTSTRAP@
solstice-bootstrap
say "starting the agent"
if (: >>"$console") 2>/dev/null; then # a failed exec would be the end
	exec >>"$console" 2>&1
fi
umask 022
exec ./agent --bootstrap "$dir/bootstrap.json" --poweroff
