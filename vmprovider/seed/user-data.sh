#!/bin/sh
# Fetches the Solstice agent for this machine and starts it. For any POSIX shell;
# names of functions keep clear of ksh's aliases, such as hash.
umask 022 # the jobs' too
set -f
dir=@DIR@
console=@CONSOLE@
url=@URL@
patience=@PATIENCE@
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
PATH=${PATH:-/usr/bin:/bin}:/usr/sbin:/sbin:/usr/local/bin:/usr/pkg/bin
export PATH

# The agent's words go there too. An exec that fails would end the shell.
if (: >>"$console") 2>/dev/null; then
	exec >>"$console" 2>&1
fi

say() {
	printf 'solstice: %s\n' "$*"
}

fail() {
	say "$*"
	exit 1
}

have() {
	command -v "$1" >/dev/null 2>&1
}

first() { # PROGRAM...: the first one that there is
	for program; do
		have "$program" && echo "$program" && return
	done
}

download() { # URL FILE
	case $client in
	curl) bounded "$2" curl -fsS -o "$2" "$1" ;;
	wget)
		case $(wget --version 2>/dev/null) in
		*GNU*) bounded "$2" wget -nv -t 1 -O "$2" "$1" ;; # -q would hide errors
		*) bounded "$2" wget -q -O "$2" "$1" ;;
		esac
		;;
	fetch) bounded "$2" fetch -q -o "$2" "$1" ;;
	ftp) bounded "$2" ftp -V -o "$2" "$1" ;;
	esac
}

# bounded FILE COMMAND...: ends it when FILE has not grown for $patience seconds.
# Not every program has a time-out: Debian's busybox wget crashes with -T.
bounded() {
	file=$1
	shift
	"$@" &
	job=$!
	{
		idle=0 was=
		while [ "$idle" -lt "$patience" ] && sleep 1; do # by the second: no long sleep is left behind
			idle=$((idle + 1))
			now=$(ls -l "$file")
			[ "$now" = "$was" ] || idle=0
			was=$now
		done
		kill "$job"
	} >/dev/null 2>&1 &
	watchdog=$!
	wait "$job" 2>/dev/null # shells speak of what was killed
	status=$?
	kill "$watchdog" 2>/dev/null
	[ "$status" -le 128 ] || echo "nothing came for $patience s"
	return "$status"
}

sum_of() { # FILE
	case $hasher in
	sha256sum) sha256sum <"$1" ;;
	sha256) sha256 -q "$1" ;;
	digest) digest -a sha256 "$1" ;;
	shasum) shasum -a 256 <"$1" ;;
	openssl) openssl dgst -sha256 -r <"$1" ;;
	esac
}

os=$(uname -s | tr '[:upper:]' '[:lower:]')
case $os in
sunos) os=illumos ;;
esac
arch=$(uname -m)
case $arch in
evbarm) arch=$(uname -p) ;; # NetBSD's ports to ARM of 32 and 64 bits
esac
case $arch in
x86_64 | amd64 | i86pc) arch=amd64 ;;
aarch64 | arm64) arch=arm64 ;;
esac
case $os/$arch in
@SUMS@
*) fail "there is no agent for $os/$arch" ;;
esac
client=$(first curl wget fetch ftp)
[ "$client" ] || fail "no curl, wget, fetch or ftp to download the agent with"
hasher=$(first sha256sum sha256 digest shasum openssl)
[ "$hasher" ] || fail "no sha256sum, sha256, digest, shasum or openssl to check the agent with"

mkdir -p -m 700 "$dir" && cd "$dir" || fail "cannot make $dir"
say "fetching the agent for $os/$arch from $url with $client"
got=
for pause in 0 @WAITS@; do
	sleep "$pause"
	rm -f agent.new
	# Into a file: ksh93 loses the status of what waits in a command substitution.
	if download "$url/$os/$arch" agent.new >agent.why 2>&1; then
		got=$(sum_of agent.new) || fail "cannot compute the SHA-256 of the agent with $hasher"
		got=${got%% *}
		if [ "$got" = "$want" ]; then
			break
		fi
		echo "its SHA-256 is $got, want $want" >agent.why
	fi
	got=
	# shellcheck disable=SC2046 # makes one line of several
	say "the agent was not fetched:" $(cat agent.why)
done
rm -f agent.why
[ "$got" ] || fail "giving up: no agent"
chmod 700 agent.new
mv -f agent.new agent || fail "cannot keep the agent in $dir"

rm -f bootstrap.json
(umask 077 && cat >bootstrap.json) <<'solstice-bootstrap' || fail "cannot write to $dir"
@BOOTSTRAP@
solstice-bootstrap
say "starting the agent"
exec ./agent --bootstrap "$dir/bootstrap.json" --poweroff
